"""weights/<t>.parquet: the judges' log-probabilities of every triplet, and the player weights beta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from tpaw_core.artifacts.parquet import ENCODED, readable, refuse_other_rows, texts
from tpaw_core.config.params import Regime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUMBERS = ("players_chosen", "players_rejected", "beta")
PRECISION = b"precision"  # metadata: the regime in which the judges scored, and in which the policy must be trained


class Weights(NamedTuple):
    """n opponents' triplets with K players, opponent by opponent."""

    prompt_ids: list[str]  # [n * rows]
    opponents: list[str]  # [n * rows] digests
    players_chosen: NDArray[np.float64]  # [n * rows, K]  log pi_j(y|x)
    players_rejected: NDArray[np.float64]  # [n * rows, K]  log pi_j(g|x)
    beta: NDArray[np.float64]  # [n * rows, K]


def write_weights(path: Path, weights: Weights, digest: str, regime: Regime) -> None:
    """``digest``: of the encoded rows. ``regime``: in which the judges scored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt_id": weights.prompt_ids, "opponent": weights.opponents}
    for name in NUMBERS:
        values = getattr(weights, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(pa.table(columns).replace_schema_metadata({ENCODED: digest, PRECISION: regime}), path)


def read_weights(path: Path, players: int, digest: str | None = None) -> Weights:
    """Raises TpawError where a column is not one finite number per player in every row, or where the file belongs to
    other encoded rows than those with ``digest``."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(name: str) -> Any:
        return pq.read_table(path, columns=[name])[name]

    values = []
    with readable(path):
        refuse_other_rows(path, pq.read_schema(path).metadata, digest, f"tpaw weights --iteration {path.stem}")
        for name in NUMBERS:  # one after the other: together they take several times the memory
            column = read(name).combine_chunks()
            sound = pa.types.is_fixed_size_list(column.type) and pa.types.is_float64(column.type.value_type)
            if not sound or column.type.list_size != players or column.null_count:
                raise ValueError(f"{name} is not one number for each of {players} players")
            numbers = column.flatten().to_numpy()  # raises where one is null
            if not np.isfinite(numbers).all():
                raise ValueError(f"{name} is not finite in every row")
            values.append(numbers.reshape(-1, players))
        return Weights(texts(read("prompt_id")), texts(read("opponent")), *values)


def scored_in(path: Path) -> Regime | None:
    """The regime in which the judges scored; None in a file from before it was recorded."""
    import pyarrow.parquet as pq

    with readable(path):
        found = (pq.read_schema(path).metadata or {}).get(PRECISION, b"").decode()
        if found and found not in get_args(Regime):
            raise ValueError(f"precision {found!r} is none of {', '.join(get_args(Regime))}")
        return cast("Regime", found) if found else None
