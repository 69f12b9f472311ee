"""Run by a test in a process of its own: compiles every Triton program for a GPU, which needs none."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from groundwire_cram.kernels import triton_kernels

SCALARS = dict.fromkeys(("size", "groups", "channels", "positions", "upper"), "i32") | {"counts_at": "*i32"}
SCALARS |= dict.fromkeys(("scale", "threshold"), "fp32")
PROGRAMS = {
    triton_kernels.perturb: {"BLOCK": 1024},
    triton_kernels.combine: {"BLOCK": 1024, "PLUS": True},
    triton_kernels.count_high: {"BLOCK": 1024, "COPIES": 8, "BINS": 1 << 15},
    triton_kernels.count_low: {"BLOCK": 1024},
    triton_kernels.mask_groups: {"BLOCK": 64, "N": 2, "M": 4, "PADDED": 4},
}


def ptx(program, entries, fixed, fusion):
    types = {n: "constexpr" if n in fixed else SCALARS.get(n, entries) for n in program.arg_names}
    source = ASTSource(program, types, {(program.arg_names.index(n),): value for n, value in fixed.items()})
    return compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": fusion}).asm["ptx"]


def main():
    for program, fixed in PROGRAMS.items():
        for entries in ("*fp32", "*bf16", "*fp16"):
            assert "fma" not in ptx(program, entries, fixed, fusion=False), (program, entries)
    assert "fma" in ptx(triton_kernels.perturb, "*fp32", PROGRAMS[triton_kernels.perturb], fusion=True)


if __name__ == "__main__":
    main()
