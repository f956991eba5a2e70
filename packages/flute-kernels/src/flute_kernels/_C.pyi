"""The compiled kernels. Tensors come as addresses (``data_ptr()``), dtypes as numbers of ``ops.DTYPES``."""

CUDA_ARCHITECTURES: str
CUDA_VERSION: str

class QWeight:
    """A weight in a room's layout; it does not own the memory."""

    def __init__(
        self,
        codes: int,
        scales: int,
        scale_dtype: int,
        tables: int,
        table_of_block: int,
        n: int,
        k: int,
        bits: int,
        vector_size: int,
        group: int,
    ) -> None: ...

def qgemm_cpu(
    weight: QWeight,
    x: int,
    m: int,
    ldx: int,
    dtype: int,
    bias: int,
    bias_dtype: int,
    out: int,
    ldo: int,
    threads: int,
) -> None: ...
def dequantize_cpu(weight: QWeight, out: int, dtype: int, threads: int) -> None: ...
def hadamard_cpu(
    x: int,
    rows: int,
    columns: int,
    ldx: int,
    dtype: int,
    signs: int,
    block: int,
    transpose: bool,
    out: int,
    ldo: int,
    threads: int,
) -> None: ...
def advise_huge_pages(begin: int, bytes: int) -> None: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def isa() -> str: ...
