"""What all groups of settings share: types of fields, and which fields determine results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Name = Annotated[str, Field(pattern=r"^[^/\\\s._][^/\\]*$")]
Precision = Literal["auto", "fp32", "bf16"]
ResizeRule = Literal["exact", "crop-centre", "pad-zero", "pad-edge", "pad-reflect", "bilinear"]
FaultName = Literal[
    "short-cluster",
    "rounding",
    "unscored-clusters",
    "undefined-is-zero",
    "reseeding",
    "monte-carlo",
    "test-target",
    "fixed-target",
    "first-predictions",
]
"""A fault of the reference implementation that `simulate` can leave in; `ctc_ray.hil.settings.FAULTS` says what each does."""


def operational(default: Any, **constraints: Any) -> Any:
    """Declare a field that has no influence on results."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def neutral(default: Any, **constraints: Any) -> Any:
    """Declare a field that is no part of an identity at its default, so that outputs made before it existed stay complete."""
    return Field(default, json_schema_extra={"neutral": True}, **constraints)


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """Settings that determine results, as JSON-like values."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict):
                continue
            if extra.get("operational") or (extra.get("neutral") and getattr(self, name) == field.default):
                values.pop(name)
        return values
