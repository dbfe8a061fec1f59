"""The compiled module (`csrc/bindings.cpp`)."""

from torch import Tensor

__version__: str
max_rank: int
interface: int

def levels() -> list[str]: ...
def level() -> str: ...
def select_level(name: str, /) -> None: ...
def set_parallel_for(address: int, /) -> None: ...
def direct_setup(capsule: object, tensor: type, parameter: type, empty_like: object, /) -> bool: ...
def steer_direct(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    strength: Tensor | None,
    /,
) -> Tensor | None: ...
def steer_replayed(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    launches: dict[bytes, tuple[object, ...]],
    device_type: int,
    many: int,
    /,
) -> Tensor | bytes | None: ...
def steer(
    dtype: int,
    n_rows: int,
    d: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    rows: int,
    rows_stride: int,
    bias: int,
    left: int,
    right: int,
    n_edits: int,
    rank: int,
    /,
) -> None: ...
def steer_many(
    dtype: int,
    n_rows: int,
    d: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    rows: int,
    edits: int,
    strength: int,
    bias: int,
    left: int,
    right: int,
    kinds: int,
    weight: int,
    offset: int,
    n_edits: int,
    rank: int,
    /,
) -> None: ...
def reduce(
    dtype: int,
    n_rows: int,
    n_columns: int,
    products: int,
    bias: int,
    target: int,
    target_stride: int,
    first: int,
    scale: float,
    softcap: float,
    coldness: float,
    maximum: int,
    total: int,
    factor: int,
    /,
) -> None: ...
def sae_features(
    encoder_type: int,
    n_rows: int,
    n_features: int,
    d: int,
    x: int,
    encoder: int,
    scale: int,
    bias: int,
    threshold: int,
    gain: int,
    offset: int,
    out: int,
    /,
) -> None: ...
def sae_top_features(
    encoder_type: int,
    n_rows: int,
    n_features: int,
    d: int,
    x: int,
    encoder: int,
    scale: int,
    bias: int,
    norms: int,
    k: int,
    sized: bool,
    pieces: int,
    values: int,
    places: int,
    /,
) -> None: ...
