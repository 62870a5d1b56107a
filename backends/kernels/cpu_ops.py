"""The CPU ops in C++: built once with the system's compiler, cached, loaded into torch.

`torch.ops.inlay_cpu`, all on CPU tensors of one dtype (float32, bfloat16, float16):

- `paged_attention(q, k, v, k_cache, v_cache, slot_mapping, block_table, seq_lens,
  query_start_loc, scale, window, softcap, sinks, causal=True, chunk=0, slopes=None)`: as
  `inlay::paged_attention`, but the cache is laid out as `kv_layout.py` says; block_size a multiple
  of 16. Sinks and slopes may have any dtype.
- `paged_attention_converted(q, k, v, k_cache, v_cache, k_scales, v_scales, slot_mapping, ...)`:
  the same over a cache of any dtype in `passes/kv_formats.py`, with its scales or None.
- `pack_linear(weight [N, K])` -> handle, an int64 tensor that owns the packed weight; it must be
  passed on as it is, never cloned. `linear(x [..., K], handle, bias, out_features)` -> [..., N].
- `pack_experts(weight [E, N, K], transposed, interleaved)` -> handle of E packed weights, gate and
  up put one after the other where they were interleaved. `experts(x, top_k_index, top_k_weights,
  up, down, ...)` as `inlay::experts`, with handles for up and down, an up_bias that is not
  interleaved, and without the arguments that packing has settled.
- `pack_int8(weight int8 [N, K])` -> handle; `int8_linear(q, x_scale, x_zero, handle, w_scale, bias,
  out_features, dtype)` as `inlay::int8_linear`, to the bit: sums are exact.
- `pack_weight_only(weight)` -> handle, of an int8, uint8 (two 4-bit numbers each) or e4m3 weight;
  `weight_only_linear(x, handle, scale, zero, bias, out_features)` and, for e4m3, `fp8_linear(q,
  x_scale, handle, w_scale, bias, out_features, dtype)` as inlay's.
- `pack_quantized_experts(weight [E, N, K], activations, interleaved)` -> handle;
  `quantized_experts(x, top_k_index, top_k_weights, up, up_scale, up_zero, down, down_scale,
  down_zero, activations, ...)` as inlay's, with handles for up and down, and up_scale, up_zero and
  up_bias not interleaved.
- `fix_rows(handle, rows)`: from now on every matrix product with this weight, or these experts',
  has so many rows, padded where there are fewer; 0 undoes it. Where a CPU's kernels sum in an order
  that depends on how many rows there are, this makes a row's bits the same in any batch.
  Quantized products need none of it: they sum each row in one order.
- `draw_tokens(logits [N, V], slots, positions, integers, floats)` -> tokens, largest logits:
  `draw_row` of `runtime/draws.py` for each row, without typical_p, with the state of `Sampler`.
- `kept_memory()` -> bytes of activations kept from one step of a `Program` to the next, bytes of
  them in use, and how many blocks had to be had from the C library since the start.
- `packed_nbytes(handle)`; `packed_format(handle)` ("onednn"; "pairs", bfloat16 for our own
  products, on x86 CPUs without AVX-512 and on those with its bfloat16 but no AMX; "plain" where
  neither we nor oneDNN have a kernel for the dtype on this CPU; "int8", "int8_weight_only",
  "int4_weight_only", "fp8"); `get_isa()`, `set_isa("auto" | "avx512_bf16" | "avx512" | "avx2" |
  "portable")`: what runs from now on, but for float weights what `pack_linear` and `pack_experts`
  pack for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from inlay.backends.cache import building, cache_dir, hold, keep
from inlay.errors import BuildError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
INTERFACE = 7
"""Goes up when an op is added, or when an op's schema or the cache layout changes; libraries of
one number can stand in for each other."""

_FLAGS = ("-std=c++20", "-O3", "-fPIC")
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
_ISA_FLAGS = {
    "avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vbmi"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
_DOT_FLAGS = ("-mavx512bf16", "-mavx512vnni", "-mavx512vbmi")
_STAMP = re.compile(rb"inlay_cpu/(\d+)/([0-9a-f]{16})")


@dataclass(frozen=True)
class _Unit:
    """One compiler call: source, object name, flags of its own."""

    source: str
    name: str
    flags: tuple[str, ...]


def build_ops(cache: Path | None = None) -> Path:
    """The built library: from the cache, or compiled into it (30 s or less on two cores).

    cache: directory for built libraries; default `ops` under `cache_dir()`.
    Raises BuildError: no compiler, the compiler failed, or the cache cannot be written.
    """
    cache = cache or cache_dir() / "ops"
    compiler = find_compiler()
    units = _units()
    key = _build_hash(compiler, units)
    place = cache / f"inlay_cpu-{key}.so"
    try:
        library = hold(place)
        if library is None:
            with building(cache) as scratch:
                keep(_compile(compiler, units, key, scratch), place)
            library = hold(place)
    except OSError as error:
        raise BuildError(
            f"cannot build the CPU ops in {cache}: {error}; set INLAY_CACHE_DIR to a directory "
            "that can be written"
        ) from error
    if library is None:
        raise BuildError(
            f"the CPU ops in {cache} were removed or damaged as they were built; again"
        )
    return library


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX if set, else c++, g++ or clang++ from PATH."""
    wanted = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else []
    for command in wanted or [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={os.environ['CXX']}" if wanted else "none of c++, g++, clang++"
    raise BuildError(
        f"backend='inductor' needs a C++ compiler: {missing} was found on PATH. Install one (apt "
        "install g++, dnf install gcc-c++, xcode-select --install), or set CXX to its path; "
        "backend='eager' needs none"
    )


def _units() -> tuple[_Unit, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    torch_flags = (
        # With it at::parallel_for runs in parallel. It is not given to the linker: the calls
        # resolve to the OpenMP runtime that libtorch_cpu brings, never to a second one.
        *(("-Xpreprocessor",) if sys.platform == "darwin" else ()),
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        *(("-DINLAY_X86",) if x86 else ()),
        *(flag for path in include_paths() for flag in ("-isystem", path)),
    )
    # NaN and infinity keep their meaning (no -ffast-math); errno and traps do not matter.
    kernel_flags = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
    dot_flags = (*kernel_flags, *_ISA_FLAGS["avx512"], *_DOT_FLAGS, "-DINLAY_ISA=avx512_dot")
    avx2_flags = (*kernel_flags, *_ISA_FLAGS["avx2"], "-DINLAY_ISA=avx2")
    only_x86 = (
        _Unit("small_matmul.cpp", "small_matmul", dot_flags),
        _Unit("quantized_dot.cpp", "quantized_dot", dot_flags),
        _Unit("small_matmul_avx2.cpp", "small_matmul_avx2", avx2_flags),
        _Unit("quantized_madd.cpp", "quantized_madd", avx2_flags),
    )
    return (
        _Unit("ops.cpp", "ops", torch_flags),
        *(only_x86 if x86 else ()),
        *(
            _Unit(f"{name}.cpp", f"{name}_{isa}", (*kernel_flags, *flags, f"-DINLAY_ISA={isa}"))
            for name in ("attention", "experts", "quantized", "sampler")
            for isa, flags in _ISA_FLAGS.items()
            if (x86 or isa == "portable") and (name == "attention" or isa != "avx512_bf16")
        ),
    )


def _build_hash(compiler: list[str], units: tuple[_Unit, ...]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    machine = (sys.platform, platform.machine(), torch.version.git_version)
    for part in (compiler, units, _FLAGS, machine, torch.__version__, INTERFACE):
        digest.update(repr(part).encode())
    digest.update(version)
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], units: tuple[_Unit, ...], key: str, scratch: Path) -> Path:
    stamp = f'-DINLAY_BUILD_STAMP="inlay_cpu/{INTERFACE}/{key}"'
    common = [*_FLAGS, stamp]

    def compile_unit(unit: _Unit) -> Path:
        to = scratch / f"{unit.name}.o"
        source = str(SOURCES / unit.source)
        _call([*compiler, *common, *unit.flags, "-c", source, "-o", str(to)])
        return to

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        objects = [str(path) for path in pool.map(compile_unit, units)]
    library = scratch / "inlay_cpu.so"
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    torch_lib = str(Path(torch.__file__).parent / "lib")
    libraries = ["-L" + torch_lib, "-ltorch_cpu", "-lc10"]
    _call([*compiler, "-shared", *objects, *undefined, *libraries, "-o", str(library)])
    return library


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BuildError(
            f"the C++ compiler failed (status {done.returncode}):\n{tail}\n"
            f"command: {shlex.join(command)}\n"
            "A C++20 compiler is needed (g++ >= 11, clang++ >= 14); backend='eager' needs none"
        )


def load_ops(path: Path | None = None) -> None:
    """Register `torch.ops.inlay_cpu` from this library; once per process.

    path: a library that `build_ops` made, such as an artifact's copy (no compiler is needed then);
        None builds it, or takes it from the cache. A second call does nothing; where its library
        is another build of the same interface the loaded one stays, and the log says so.
    Raises BuildError: path is not such a library, was built for another torch, or its interface
    is not that of the library loaded before.
    """
    loaded = _loaded_stamp()
    if loaded and path is None:
        return
    path = path or build_ops()
    stamp = _stamp(path)
    if loaded:
        if stamp[0] != loaded[0]:
            raise BuildError(
                f"{path} has interface {stamp[0]} of the CPU ops, this process has loaded "
                f"interface {loaded[0]}; load it in a process of its own, or rebuild the artifact"
            )
        if stamp != loaded:
            logger.warning(
                "CPU ops %s stay loaded; %s holds build %s of the same interface",
                loaded[1],
                path,
                stamp[1],
            )
        return
    if int(stamp[0]) != INTERFACE:
        raise BuildError(
            f"{path} has interface {stamp[0]} of the CPU ops, this version of inlay needs "
            f"{INTERFACE}; rebuild the artifact"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(
            f"cannot load the CPU ops {path} into torch {torch.__version__}: {error}; they were "
            "probably built for another torch or machine: rebuild the artifact here"
        ) from error
    _register_fakes()


def _loaded_stamp() -> tuple[str, str] | None:
    if not hasattr(torch.ops.inlay_cpu, "build_stamp"):
        return None
    return _parse_stamp(torch.ops.inlay_cpu.build_stamp().encode())


def _stamp(path: Path) -> tuple[str, str]:
    """Interface number and build hash that a library carries, read without loading it."""
    stamp = _parse_stamp(path.read_bytes()) if path.is_file() else None
    if stamp is None:
        raise BuildError(f"{path} is not a library of inlay's CPU ops; rebuild the artifact")
    return stamp


def _parse_stamp(data: bytes) -> tuple[str, str] | None:
    match = _STAMP.search(data)
    return (match[1].decode(), match[2].decode()) if match else None


def _register_fakes() -> None:
    """What torch.export and the compilers need: output shapes, without data."""

    @torch.library.register_fake("inlay_cpu::paged_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])

    @torch.library.register_fake("inlay_cpu::paged_attention_converted")
    def _(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])

    @torch.library.register_fake("inlay_cpu::linear")
    def _(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("inlay_cpu::experts")
    def _(x: Tensor, *_: object, **__: object) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("inlay_cpu::pack_experts")
    def _(weight: Tensor, transposed: bool = False, interleaved: bool = False) -> Tensor:
        return weight.new_empty(4, dtype=torch.int64)

    @torch.library.register_fake("inlay_cpu::pack_linear")
    @torch.library.register_fake("inlay_cpu::pack_int8")
    @torch.library.register_fake("inlay_cpu::pack_weight_only")
    def _(weight: Tensor) -> Tensor:
        return weight.new_empty(4, dtype=torch.int64)

    @torch.library.register_fake("inlay_cpu::int8_linear")
    def _(
        q: Tensor,
        x_scale: Tensor,
        x_zero: Tensor | None,
        handle: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return q.new_empty(*q.shape[:-1], out_features, dtype=dtype)

    @torch.library.register_fake("inlay_cpu::fp8_linear")
    def _(
        q: Tensor,
        x_scale: Tensor,
        handle: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return q.new_empty(*q.shape[:-1], out_features, dtype=dtype)

    @torch.library.register_fake("inlay_cpu::weight_only_linear")
    def _(
        x: Tensor,
        handle: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("inlay_cpu::quantized_experts")
    def _(x: Tensor, *_: object, **__: object) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("inlay_cpu::pack_quantized_experts")
    def _(weight: Tensor, activations: str, interleaved: bool = False) -> Tensor:
        return weight.new_empty(4, dtype=torch.int64)
