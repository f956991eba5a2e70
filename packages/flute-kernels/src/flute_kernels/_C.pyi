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
        table_count: int,
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
def qgemm_cuda(
    weight: QWeight,
    x: int,
    m: int,
    ldx: int,
    dtype: int,
    bias: int,
    bias_dtype: int,
    out: int,
    ldo: int,
    workspace: int,
    device: int,
    stream: int,
) -> int: ...
def qgemm_grouped_cuda(
    weight: QWeight,
    x: int,
    m: int,
    ldx: int,
    dtype: int,
    counts: int,
    experts: int,
    out: int,
    ldo: int,
    workspace: int,
    device: int,
    stream: int,
) -> int: ...
def dequantize_cuda(
    weight: QWeight, out: int, dtype: int, first_row: int, rows: int, device: int, stream: int
) -> None: ...
def hadamard_cuda(
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
    device: int,
    stream: int,
) -> None: ...
def pack_cuda(qweight: int, codes: int, n: int, k: int, bits: int, device: int, stream: int) -> None: ...
def unpack_cuda(codes: int, qweight: int, n: int, k: int, bits: int, device: int, stream: int) -> None: ...
def refusal_of_gpu(device: int) -> str: ...
def plan_sm80(
    n: int,
    k: int,
    bits: int,
    group: int,
    tables: int,
    m: int,
    multiprocessors: int,
    shared_bytes: int,
    experts: int,
) -> dict[str, int]: ...
def plan_sm90(
    n: int, k: int, bits: int, group: int, tables: int, m: int, multiprocessors: int, experts: int
) -> dict[str, int]: ...
def launch_early(early: bool) -> None: ...
def advise_huge_pages(begin: int, bytes: int) -> None: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def isa() -> str: ...
