"""Where each stage's output lives under one URI, which patients there are, and the role of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl
import pyarrow as pa

from ctc_ray.errors import ConfigError, MissingInputError, RoleLeakError, SchemaError
from ctc_ray.records import Record, damaged_files, read_record
from ctc_ray.schema import PATIENTS_SCHEMA, ROLES, check_columns
from ctc_ray.storage import Store

PATIENTS_PATH = "patients.parquet"


def check_patient_id(patient: str) -> str:
    """Return a patient id that can name a folder.

    Raises:
        ConfigError: it is empty, has a path separator or a leading dot or underscore, or starts or ends with a space.
    """
    if not patient or patient != patient.strip() or patient[0] in "._" or any(c in patient for c in "/\\\0\n\r\t"):
        raise ConfigError(
            f"patient id {patient!r} cannot name a folder: rename the cartridge folder (no slashes, no leading dot or underscore)"
        )
    return patient


class Cohort:
    """One cohort on disk or in object storage; holds no data, only knows where it lies."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"Cohort({self.store.uri!r})"

    @classmethod
    def open(cls, uri: str, *, create: bool = False) -> Cohort:
        """Open a cohort.

        Args:
            uri: local path or URI.
            create: whether a cohort that does not exist yet is fine (segment, demo).

        Raises:
            MissingInputError: there is no cohort there and `create` is not set.
        """
        cohort = cls(Store(uri))
        if not create and not cohort.store.exists(PATIENTS_PATH):
            raise MissingInputError(
                f"{uri} holds no cohort (no {PATIENTS_PATH}): check the path, or start one with `ctc-ray segment {uri} --cartridges DIR`"
            )
        return cohort

    # Patients and roles ---------------------------------------------------------------------------------------------

    def patients(self) -> pl.DataFrame:
        """Columns patient, role (null before `split`), cartridge; sorted by patient."""
        if not self.store.exists(PATIENTS_PATH):
            return pl.DataFrame(schema={"patient": pl.String, "role": pl.String, "cartridge": pl.String})
        table = check_columns(self.store.read_table(PATIENTS_PATH), PATIENTS_SCHEMA, self.store.describe(PATIENTS_PATH))
        frame = pl.from_arrow(table)
        if not isinstance(frame, pl.DataFrame):
            raise SchemaError(f"{PATIENTS_PATH} is not a table")
        if frame["patient"].n_unique() != frame.height:
            raise RoleLeakError(
                f"{self.store.describe(PATIENTS_PATH)} lists a patient twice: keep one row, and so one role, a patient"
            )
        unknown = sorted(set(frame["role"].drop_nulls()) - set(ROLES))
        if unknown:
            raise SchemaError(
                f"{self.store.describe(PATIENTS_PATH)}: unknown roles {', '.join(unknown)}; known are {', '.join(ROLES)}"
            )
        return frame.sort("patient")

    def write_patients(self, frame: pl.DataFrame) -> None:
        """Replace `patients.parquet`."""
        table = frame.select(PATIENTS_SCHEMA.names).sort("patient").to_arrow().cast(PATIENTS_SCHEMA)
        self.store.write_table(PATIENTS_PATH, table)

    def add_patients(self, cartridges: dict[str, str]) -> None:
        """Add patients (id -> cartridge folder or name) with no role; those already listed keep their row."""
        known = self.patients()
        new = sorted(set(cartridges) - set(known["patient"]))
        if not new:
            return
        rows = pl.DataFrame(
            {
                "patient": [check_patient_id(p) for p in new],
                "role": [None] * len(new),
                "cartridge": [cartridges[p] for p in new],
            },
            schema=known.schema,
        )
        self.write_patients(pl.concat([known, rows]))

    def patient_ids(self) -> list[str]:
        """All patients, sorted."""
        return list(self.patients()["patient"])

    def patients_by_role(self, *roles: str) -> list[str]:
        """Patients of the roles, sorted; [] where none has one."""
        return list(self.patients().filter(pl.col("role").is_in(list(roles)))["patient"])

    def select_patients(self, names: Sequence[str] | None, *roles: str) -> list[str]:
        """Patients that a stage works on: those named, or those of the roles, or all.

        Raises:
            ConfigError: a named patient is not in the cohort.
        """
        if names:
            unknown = sorted(set(names) - set(self.patient_ids()))
            if unknown:
                raise ConfigError(
                    f"no patient {', '.join(map(repr, unknown))} in {self.store.uri}: it has {', '.join(self.patient_ids())}"
                )
            return sorted(set(names))
        return self.patients_by_role(*roles) if roles else self.patient_ids()

    def require_role(self, patients: Iterable[str], *roles: str) -> None:
        """Refuse patients of another role.

        Raises:
            RoleLeakError: a patient has none of the roles.
        """
        allowed = set(self.patients_by_role(*roles))
        leaked = sorted(set(patients) - allowed)
        if leaked:
            raise RoleLeakError(
                f"patients {', '.join(leaked)} do not have the role {' or '.join(roles)}: using them here would leak data between splits. "
                "Correct the selection, or the roles with `ctc-ray split`"
            )

    # Folders --------------------------------------------------------------------------------------------------------

    def cells(self, patient: str) -> str:
        """Folder of a patient's cells."""
        return f"cells/{patient}"

    def duplicates_path(self, patient: str) -> str:
        """Table of a patient's physical cells."""
        return f"duplicates/{patient}.parquet"

    def encoder(self, encoder_id: str) -> str:
        """Folder of an encoder."""
        return f"encoders/{encoder_id}"

    def embeddings(self, encoder_id: str, patient: str) -> str:
        """Folder of a patient's embeddings by one encoder."""
        return f"embeddings/{encoder_id}/{patient}"

    def latent(self, encoder_id: str, map_name: str) -> str:
        """Folder of a latent map: its models and its record."""
        return f"latent/{encoder_id}/{map_name}"

    def latent_cells(self, encoder_id: str, map_name: str, patient: str) -> str:
        """Folder of one patient's cells on a latent map."""
        return f"latent/{encoder_id}/{map_name}/cells/{patient}"

    def classifier(self, name: str) -> str:
        """Folder of a classifier."""
        return f"classifiers/{name}"

    def index(self, encoder_id: str) -> str:
        """Folder of the FAISS index over one encoder's embeddings."""
        return f"index/{encoder_id}"

    def simulation(self, name: str) -> str:
        """Folder of a simulation."""
        return f"simulations/{name}"

    def detection(self, name: str) -> str:
        """Folder of a detection run."""
        return f"detections/{name}"

    def report(self, name: str) -> str:
        """Folder of a report."""
        return f"reports/{name}"

    # Reading --------------------------------------------------------------------------------------------------------

    def shards(self, folder: str) -> list[str]:
        """Parquet files that the record of a folder lists, as paths below the cohort; [] where there is no record."""
        record = read_record(self.store, folder)
        return sorted(f"{folder}/{name}" for name in (record.files if record else ()) if name.endswith(".parquet"))

    def require(self, folder: str, stage: str) -> Record:
        """Record of an earlier stage's output.

        Raises:
            MissingInputError: that stage has not finished it; the message names the command.
        """
        record = read_record(self.store, folder)
        if record is None:
            raise MissingInputError(
                f"{self.store.describe(folder)} is not complete: run `ctc-ray {stage} {self.store.uri}` first"
            )
        damaged = damaged_files(self.store, folder, record)
        if damaged:
            raise MissingInputError(
                f"{self.store.describe(folder)} lacks {', '.join(damaged)} of its record: run `ctc-ray {stage} {self.store.uri}` again"
            )
        return record

    def read_columns(self, folder: str, columns: list[str]) -> pa.Table:
        """Read named columns of all shards of one folder (never `pixels` of many patients at once)."""
        paths = self.shards(folder)
        if not paths:
            raise MissingInputError(f"{self.store.describe(folder)} holds no finished shards")
        return pa.concat_tables([self.store.read_table(path, columns) for path in paths])

    def physical_ids(self, patient: str) -> pl.DataFrame:
        """Columns cell_id, physical_id of one patient.

        Raises:
            MissingInputError: the patient was not segmented.
        """
        frame = pl.from_arrow(self.store.read_table(self.duplicates_path(patient)))
        if not isinstance(frame, pl.DataFrame):
            raise SchemaError(f"{self.duplicates_path(patient)} is not a table")
        return frame
