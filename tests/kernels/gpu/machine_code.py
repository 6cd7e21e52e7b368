"""What the GPU kernels become for GPUs that are not here: compiled ahead of time, disassembled and counted.

    python tests/kernels/gpu/machine_code.py --write          all variants on all targets, into machine_code.jsonl
    python tests/kernels/gpu/machine_code.py sm_90 bfloat16   a target's, of a dtype, to standard output

A line is a kernel for one dtype, shape, and epilogue or mask, on one target:

    registers, shared_bytes   of a thread, and of a program
    spilled                   whether registers are kept in memory
    load_bits, store_bits     the widest of the batch's accesses
    float_atomics             how many atomic operations on floating numbers: their order would change bits
    fenced                    whether what a program stored is seen before the counter's atomic operation; null without
    bound                     time of the busiest pipe over that of memory in the loop over tiles, by device
"""

import argparse
import collections
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import syncbn.kernels.gpu as package
from syncbn.kernels import Epilogue
from syncbn.kernels.epilogue import ACTIVATIONS
from syncbn.kernels.gpu import elementwise, sums
from syncbn.kernels.gpu.blocks import Device, blocks_of

TABLE = Path(__file__).with_name("machine_code.jsonl")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {f"sm_{v}": GPUTarget("cuda", v, 32) for v in (80, 90, 100, 120)}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942")}
KERNELS = {
    "stats": (sums.stats_kernel, "sum"),
    "normalise": (elementwise.normalise_kernel, "map"),
    "backward_reduce": (sums.backward_reduce_kernel, "sum"),
    "backward_elemt": (elementwise.backward_elemt_kernel, "map"),
}
SHAPES = {"channels_last": (32 * 56 * 56, 64, 1), "contiguous": (32, 64, 56 * 56), "odd": (32, 2048, 49)}
EPILOGUES = {
    "none": Epilogue(),
    "relu": Epilogue("relu"),
    "silu": Epilogue("silu"),
    "leaky_relu in place": Epilogue("leaky_relu", 0.1, True),
    "residual, relu": Epilogue("relu"),
    "residual, silu": Epilogue("silu"),
    "mask": Epilogue(),
    "residual, relu, mask": Epilogue("relu"),
}
# What differs from one target to the other was looked at in bfloat16 alone.
DTYPES = {"bfloat16": tuple(TARGETS), "float16": ("sm_90",), "float32": ("sm_90", "gfx942"), "float64": ("sm_90",)}
SLOW_FLOAT64 = ("sm_120",)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
# Of one multiprocessor and clock: float64 operations, conversions to and from float64, and bytes of memory. The first
# two are in the CUDA programming guide's table of throughput; the third is bandwidth / multiprocessors / boost clock.
PIPES = {
    "sm_80": {"A100": (32, 16, 2.039e12 / 108 / 1.41e9)},
    "sm_90": {"H100": (64, 16, 3.35e12 / 132 / 1.755e9), "H200": (64, 16, 4.8e12 / 132 / 1.755e9)},
    "sm_100": {"B200": (64, 16, 8e12 / 148 / 1.9e9)},
    "sm_120": {"RTX 5090": (2, 2, 1.79e12 / 170 / 2.4e9)},
}
OPERATION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
WARP, ISSUED = 32, 4  # threads; instructions of warps in a clock


def sources_hash() -> str:
    """Of what the machine code is made of."""
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    text = "".join(f.read_text() for f in files if f.stem in ("arithmetic", "sums", "elementwise", "blocks"))
    return hashlib.sha256(f"{triton.__version__}{text}".encode()).hexdigest()[:16]


def variants(target: str, dtype: str):
    """Yields kernel, shape and epilogue, each by name."""
    for shape in SHAPES:
        for kernel in KERNELS:
            for epilogue in EPILOGUES:
                residual = epilogue.startswith("residual")
                if (kernel == "stats" and epilogue not in ("none", "mask")) or (
                    kernel == "backward_elemt" and residual
                ):
                    continue
                if dtype != "bfloat16" and epilogue not in ("none", "residual, relu", "mask"):
                    continue
                yield kernel, shape, epilogue


def compiled(target: str, dtype: str, kernel: str, shape: str, epilogue: str):
    """Returns what Triton makes of a variant, for arrays that are aligned to 16 bytes."""
    function, kind = KERNELS[kernel]
    names, short = function.arg_names, SHORT[dtype]
    slow_float64 = target in SLOW_FLOAT64 and dtype != "float64"
    device = Device(programs=2 * 132, warp_threads=TARGETS[target].warp_size, slow_float64=slow_float64)
    blocks = blocks_of(*SHAPES[shape], getattr(torch, dtype).itemsize, device, kind, epilogue.endswith("mask"))
    activation, _, in_place = EPILOGUES[epilogue]
    constants = dict(zip(("UNIT", "LAST", "ROWS", "COLS"), blocks.shape, strict=True))
    constants |= {
        "ERROR_FREE": slow_float64,
        "ADD": blocks.added,
        "ACT": ACTIVATIONS.index(activation),
        "IN_PLACE": in_place,
    }
    absent = ["momentum_tensor", *(["center"] if dtype != "float64" else [])]
    absent += ["residual", "gate", "g_out"] if not epilogue.startswith("residual") else []
    absent += ["mask"] if not epilogue.endswith("mask") else []
    constants = {n: v for n, v in (constants | dict.fromkeys(absent)).items() if n in names}
    batch = dict.fromkeys(("x", "y", "dy", "dx", "residual", "gate", "g_out"), "*" + short)
    wide = dict.fromkeys(("center", "moments", "partial", "statistics", "sums", "momentum_tensor"), "*fp64")
    vectors = ("weight", "bias", "running_mean", "running_var", "grad_weight", "grad_bias")
    types = batch | wide | dict.fromkeys(vectors, "*fp32") | {"counter": "*i32", "batches": "*i64", "mask": "*i1"}
    types |= {p.name: p.annotation_type for p in function.params if p.annotation_type}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=TARGETS[target], options=blocks.options(is_hip=target.startswith("gfx")))


def line(target: str, dtype: str, kernel: str, shape: str, epilogue: str) -> dict:
    """Returns a line of the table."""
    result = {"target": target, "dtype": dtype, "kernel": kernel, "shape": shape, "epilogue": epilogue}
    code = compiled(target, dtype, kernel, shape, epilogue)
    return result | (nvidia(code, target) if target.startswith("sm_") else amd(code))


def nvidia(code, target: str) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        sass = run(TOOLS / "nvdisasm", "-c", file.name)
        usage = run(TOOLS / "cuobjdump", "-res-usage", file.name)
    operations = [
        m[1] for m in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    ]
    loop = max(loops(sass), key=traffic, default=collections.Counter(operations))
    atomic = next((i for i, op in enumerate(operations) if op.startswith("ATOMG")), None)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": code.metadata.shared,
        "spilled": any(op.startswith(("LDL", "STL")) for op in operations),
        "load_bits": max(bits(op) for op in loop if op.startswith("LDG")),
        "store_bits": max((bits(op) for op in loop if op.startswith("STG")), default=None),
        "float_atomics": sum(bool(re.match(r"(ATOM|RED).*\.F(16|32|64|TZ)", op)) for op in operations),
        "fenced": None if atomic is None else any(op.startswith("MEMBAR") for op in operations[:atomic]),
        "bound": {device: round(bound(loop, *pipes), 2) for device, pipes in PIPES[target].items()},
    }


def loops(sass: str) -> list[collections.Counter]:
    """Counts the operations of the innermost loops: from a label to a branch back to it."""
    lines, labels, spans = sass.splitlines(), {}, []
    for i, text in enumerate(lines):
        if found := re.match(r"\s*(\.L_x?\w+):", text):
            labels[found[1]] = i
        elif (found := re.search(r"BRA.*`\((\.L_\w+)\)", text)) and found[1] in labels:
            spans.append((labels[found[1]], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [collections.Counter(OPERATION.findall("\n".join(lines[a : b + 1]))) for a, b in inner]


def bits(operation: str) -> int:
    """Of an access to memory by one thread."""
    found = re.search(r"\.(128|64|U16|U8|S16)(?:\.|$)", operation)
    return {"U16": 16, "S16": 16, "U8": 8}.get(found[1]) or int(found[1]) if found else 32


def traffic(loop: collections.Counter) -> int:
    """Bytes that a warp moves in a loop over tiles; the loop over partial sums, past the L1 cache, is none."""
    accesses = {op: n for op, n in loop.items() if op.startswith(("LDG", "STG")) and "STRONG" not in op}
    return sum(WARP * bits(op) // 8 * n for op, n in accesses.items())


def bound(loop: collections.Counter, float64: int, conversions: int, memory_bytes: float) -> float:
    """Returns how long the busiest pipe takes for a loop, of the time that memory takes."""
    wide = sum(n for op, n in loop.items() if op.startswith(("DADD", "DMUL", "DFMA", "DSETP")))
    converted = sum(n for op, n in loop.items() if op.startswith("F2F"))
    clocks = [sum(loop.values()) / ISSUED, WARP * wide / float64, WARP * converted / conversions]
    if float64 == conversions:  # one slow unit serves both
        clocks.append(WARP * (wide + converted) / float64)
    return max(clocks) * memory_bytes / traffic(loop)


def amd(code) -> dict:
    text = code.asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text))
    operations = re.findall(r"^\s+([a-z]\w+)", text, re.M)
    widths = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx4": 128}
    loads, stores = (re.findall(rf"^\s+(?:global|buffer)_{w}_(\w+)\s", text, re.M) for w in ("load", "store"))
    atomic = next((i for i, op in enumerate(operations) if op.startswith("global_atomic")), None)
    before = operations[:atomic]
    accesses = [i for i, op in enumerate(before) if op.startswith(("global_", "buffer_load", "s_load"))]
    return {
        "registers": int(numbers["vgpr_count"]),
        "shared_bytes": code.metadata.shared,
        "spilled": numbers["vgpr_spill_count"] != "0" or numbers["sgpr_spill_count"] != "0",
        "load_bits": max(widths.get(w, 0) for w in loads),
        "store_bits": max(widths.get(w, 0) for w in stores),
        "float_atomics": sum(bool(re.match(r"(global|buffer|flat)_atomic_\w*f(16|32|64)", op)) for op in operations),
        # All accesses are waited for before; where a chip has several caches, LLVM also writes them back.
        "fenced": None if atomic is None else "s_waitcnt" in before[accesses[-1] :],
        "bound": None,
    }


def run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("dtype", nargs="?", choices=DTYPES, default="bfloat16")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sources", action="store_true", help="print what the sources are now, as in the first line")
    arguments = parser.parse_args()
    if arguments.sources:
        print(sources_hash())
        return
    if not arguments.write:
        for variant in variants(arguments.target or "sm_90", arguments.dtype):
            print(json.dumps(line(arguments.target or "sm_90", arguments.dtype, *variant)), flush=True)
        return
    with TABLE.open("w") as file:
        print(json.dumps({"sources": sources_hash(), "triton": triton.__version__}), file=file)
        for dtype, targets in DTYPES.items():
            for target in targets:
                for variant in variants(target, dtype):
                    print(json.dumps(line(target, dtype, *variant)), file=file, flush=True)


if __name__ == "__main__":
    main()
