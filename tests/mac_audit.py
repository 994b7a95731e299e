"""Look up in MLX's packages for macOS what this project asks of Metal: `make mac-audit`.

pip downloads the packages of the installed version of MLX for macOS 14 and 26 (45 and 78 MB) into a
temporary folder. The exit code is 1 where a kernel or a text is missing. Run it when MLX's version
changes. Kernels that MLX compiles on the Mac itself (fused operations, gather, scatter) are in no
package.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from itertools import product
from pathlib import Path

PLATFORMS = ("macosx_14_0_arm64", "macosx_26_0_arm64")
# The names that mlx/backend/metal of MLX 0.32 (commit 846d176) builds for the default model; of
# products and vectors times matrices, those of every size of chip
KERNELS = """
rope_{bfloat16,float32} rope_single_{bfloat16,float32} {,vjp_}layer_normfloat32
steel_gemm_fused_{nn,nt,tn}_{bfloat16_bfloat16,float32_float32}_bm64_bn64_bk16_wm{1,2}_wn2
steel_gemm_fused_{nn,nt,tn}_{bfloat16_bfloat16,float32_float32}_bm64_bn32_bk32_wm2_wn2
steel_gemm_fused_{nn,nt,tn}_{bfloat16_bfloat16,float32_float32}_bm32_bn64_bk16_wm1_wn2
gemv_t_{bfloat16,float32}_bm1_bn{2,4,16}_sm8_sn4_tm4_tn4_nc0_axpby0
gemv_{bfloat16,float32}_bm1_bn8_sm1_sn32_tm4_tn4_nc{0,1}_axpby0
rbitsc arangeint32 argmax_float32 carg_block_sort_float32_uint32_bn128_tn4
block_{softmax,logsumexp}_float32 contig_scan_inclusive_sum_{float32_float32,uint32_uint32}
{all_reduce,row_reduce_looped_1_reduce,col_reduce_looped_1_32_32_reduce}_sumfloat32
v_copy{float32bfloat16,bfloat16float32,float32uint8,float32uint32,uint64float32}
{g3_copybfloat16bfloat16,s_copyuint64uint64} v_Select{bfloat16,float32,uint64} vv_Adduint64
vv_{Add,Subtract,Multiply,Divide,Maximum,Minimum,Power,Less,LessEqual,GreaterEqual,Equal}float32
v_{Sqrt,Square,Negative,Sign,Sin,Cos,ErfInv}float32float32
"""
M5 = """
steel_gemm_fused_nax_{nn,nt,tn}_bfloat16_bfloat16_bm64_bn128_bk{64,256}_wm2_wn4
steel_gemm_fused_nax_{nn,nt,tn}_bfloat16_bfloat16_bm128_bn128_bk512_wm4_wn4
"""
TEXTS = (  # by which memory.is_exhausted and others know MLX's errors
    b"Unable to allocate",
    b"the maximum allowed buffer size",
    b"Resource limit (",
    b"[METAL] Command buffer execution failed",
)


def expand(patterns: str) -> list[str]:
    """Return the names that patterns stand for; `{a,b}` is a or b."""
    pieces = [[part.split(",") for part in re.split("[{}]", p)] for p in patterns.split()]
    return ["".join(name) for parts in pieces for name in product(*parts)]


def missing(kernels: str, metallib: bytes, library: bytes) -> list[str]:
    """Return the kernels that a Metal library lacks, and the texts that MLX's own library lacks."""
    names = {name.decode() for name in re.findall(rb"NAME..(\w+)\0", metallib, re.S)}
    lacking = [name for name in expand(kernels) if name not in names]
    return lacking + [text.decode() for text in TEXTS if text not in library]


def main() -> int:
    """Download and check the package for each of PLATFORMS. Returns the exit code."""
    failed = False
    for platform in PLATFORMS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--platform", platform, "--dest", folder]
            subprocess.run([*command, f"mlx-metal=={version('mlx')}"], check=True)
            package = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(package) as files:
                metallib, library = (
                    files.read(f"mlx/lib/{name}") for name in ("mlx.metallib", "libmlx.dylib")
                )
        kernels = KERNELS + (M5 if "26" in platform else "")
        lacking = missing(kernels, metallib, library)
        targets = {t.decode() for t in re.findall(rb"apple-(macosx[\d.]+)", metallib)}
        print(f"{package.name}: built for {', '.join(sorted(targets))}")
        print(f"  {len(expand(kernels))} kernels, {len(TEXTS)} texts; missing: {lacking or 'none'}")
        failed |= bool(lacking)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
