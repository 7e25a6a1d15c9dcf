import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray import schema
from ctc_ray.errors import SchemaError


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(
        st.text(min_size=1, max_size=8),
        st.integers(1, 300),
        st.integers(0, 1035),
        st.integers(0, 1383),
        st.text(max_size=6),
    ),
    st.tuples(
        st.text(min_size=1, max_size=8),
        st.integers(1, 300),
        st.integers(0, 1035),
        st.integers(0, 1383),
        st.text(max_size=6),
    ),
)
def test_cell_id_differs_exactly_when_its_parts_differ(
    one: tuple[str, int, int, int, str], other: tuple[str, int, int, int, str]
) -> None:
    assert (schema.cell_id(*one) == schema.cell_id(*other)) == (one == other)


def test_cell_id_parts_cannot_run_into_each_other() -> None:
    assert schema.cell_id("1", 11, 1, 1, "f") != schema.cell_id("11", 1, 1, 1, "f")
    assert schema.cell_id("007", 1, 2, 3, "f") != schema.cell_id("7", 1, 2, 3, "f")


def test_cell_id_is_the_same_on_every_machine() -> None:
    assert schema.cell_id("Müller 3", 12, 34, 56, "abc") == schema.cell_id("Müller 3", 12, 34, 56, "abc")
    assert len(schema.cell_id("a", 1, 1, 1, "f")) == 24


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_survive_packing_slicing_and_chunks(dtype: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    crops = rng.integers(0, np.iinfo(dtype).max, (7, channels, 48, 48)).astype(dtype)
    crops[2] = 0  # trailing zero bytes must not be lost
    field = schema.pixels_field(dtype, channels)
    column = pa.chunked_array([schema.pack_pixels(crops[:3]), schema.pack_pixels(crops[3:])])
    np.testing.assert_array_equal(schema.unpack_pixels(column, field), crops)
    np.testing.assert_array_equal(schema.unpack_pixels(schema.pack_pixels(crops).slice(2, 4), field), crops[2:6])


def test_unpack_pixels_of_no_rows_keeps_shape_and_dtype() -> None:
    field = schema.pixels_field("uint16", 3)
    empty = schema.unpack_pixels(pa.chunked_array([], field.type), field)
    assert empty.shape == (0, 3, 48, 48)
    assert empty.dtype == np.uint16


def test_unpack_pixels_without_metadata_is_refused() -> None:
    with pytest.raises(SchemaError, match="not written by ctc_ray"):
        schema.unpack_pixels(
            schema.pack_pixels(np.zeros((1, 3, 48, 48), np.uint8)), pa.field("pixels", pa.binary(6912))
        )


@pytest.mark.parametrize(
    "crops", [np.zeros((1, 3, 40, 48), np.uint8), np.zeros((3, 48, 48), np.uint8), np.zeros((1, 3, 48, 48))]
)
def test_pack_pixels_of_wrong_shape_or_dtype_is_refused(crops: np.ndarray) -> None:
    with pytest.raises(SchemaError):
        schema.pack_pixels(crops)


def test_cells_schema_holds_the_contract_columns_and_carries_dtype_in_the_field() -> None:
    cells = schema.cells_schema("uint16")
    wanted = [
        "cell_id",
        "patient",
        "field",
        "row",
        "col",
        "global_row",
        "global_col",
        "y0",
        "x0",
        "prob",
        "diameter_um",
        "at_edge",
    ]
    wanted.append("pixels")
    assert [name for name in cells.names if name in wanted] == wanted
    assert cells.field("pixels").metadata[b"dtype"] == b"uint16"
    assert cells.field("pixels").type == pa.binary(3 * 48 * 48 * 2)


def test_check_columns_names_what_is_missing_and_casts_the_rest() -> None:
    table = pa.table({"cell_id": ["a"], "physical_id": ["b"], "more": [1]})
    assert schema.check_columns(table, schema.DUPLICATES_SCHEMA, "t").column_names == ["cell_id", "physical_id"]
    with pytest.raises(SchemaError, match="missing columns physical_id"):
        schema.check_columns(table.drop(["physical_id"]), schema.DUPLICATES_SCHEMA, "t")
