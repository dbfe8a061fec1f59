"""The compiled CUDA module (`csrc/cuda/bindings.cpp`)."""

__version__: str
max_rank: int
architectures: str

def runtime_version() -> int: ...
def driver_version() -> int: ...
def check_device(device: int, /) -> None: ...
def steer(
    dtype: int,
    table_dtype: int,
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
    device: int,
    stream: int,
    /,
) -> None: ...
def steer_many(
    dtype: int,
    table_dtype: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
    /,
) -> None: ...
