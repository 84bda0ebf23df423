"""Lines of ptxas and cuobjdump of CUDA 13, read."""

import pytest

from kernels.resources import Compiled, Sass, parse_ptxas, parse_sass

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4gemmILi2EEvv' for 'sm_80'
ptxas info    : Function properties for _Z4gemmILi2EEvv
    64 bytes stack frame, 184 bytes spill stores, 124 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 64 bytes cumulative stack size, 16 bytes smem, 432 bytes cmem[0]
ptxas info    : Compile time = 68.992 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4gemmILi2EEvv' for 'sm_120a'
ptxas info    : Function properties for _Z4gemmILi2EEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z4helperv
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compile time = 1.087 ms
"""  # noqa: E501

SASS = """\
\tcode for sm_120a
\t\tFunction : _Z5firstv
\t.headerflags\t@"EF_CUDA_SM120"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;                            /* 0x00df */
                                                                                      /* 0x000f */
        /*0010*/              @!P1 LDG.E.NA.128.CONSTANT R40, desc[UR6][R8.64] ;      /* 0x0006 */
        /*0020*/                   LDG.E.128.STRONG.GPU R4, desc[UR6][R2.64] ;        /* 0x0006 */
        /*0030*/              @UP0 LDG.E.NA.64.CONSTANT R44, desc[UR6][R10.64] ;      /* 0x0006 */
        /*0040*/                   LDG.E.U16 R14, desc[UR8][R8.64] ;                  /* 0x0008 */
        /*0050*/                   LDG.E R14, desc[UR8][R8.64] ;                      /* 0x0008 */
        /*0060*/              @!P0 LDGSTS.E.BYPASS.128 [R5+0x2200], desc[UR6][R6.64] ; /* 0x0220 */
        /*0070*/                   LDGDEPBAR ;                                        /* 0x0000 */
        /*0080*/                   LDSM.16.M88.4 R148, [R180] ;                       /* 0x0000 */
        /*0090*/                   HMMA.16816.F32.BF16 R136, R76, R148, RZ ;          /* 0x0000 */
        /*00a0*/                   HFMA2 R28, -RZ, RZ, 0, 0 ;                         /* 0x0000 */
        /*00b0*/                   EXIT ;                                             /* 0x0000 */
\t\t..........


\t\tFunction : _Z6secondv
        /*0000*/                   STL [R1+0x4], R28 ;                                /* 0x0000 */
        /*0010*/                   LDL.LU R28, [R1+0x4] ;                             /* 0x0000 */
        /*0020*/                   LDL R28, [R1] ;                                    /* 0x0000 */
"""


def test_ptxas_figures_are_by_kernel_and_architecture():
    name = "_Z4gemmILi2EEvv"
    assert parse_ptxas(PTXAS) == {
        (name, "sm_80"): Compiled(128, 64, 184, 124, 16),
        (name, "sm_120a"): Compiled(40, 0, 0, 0, 0),
    }


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("Used 128", "no registers of"), ("64 bytes stack frame", "no stack frame of")],
)
def test_ptxas_output_of_another_format_is_refused(left_out, message):
    text = "\n".join(line for line in PTXAS.splitlines() if left_out not in line)
    with pytest.raises(ValueError, match=f"{message} _Z4gemmILi2EEvv for sm_80"):
        parse_ptxas(text)


def test_ptxas_output_that_ends_within_a_kernel_is_refused():
    with pytest.raises(ValueError, match="no registers of _Z4gemmILi2EEvv for sm_120a"):
        parse_ptxas(PTXAS[: PTXAS.rindex("ptxas info    : Used 40")])


def test_instructions_are_counted_by_kernel_and_width():
    kernels = parse_sass(SASS)
    assert kernels == {
        "_Z5firstv": Sass(
            instructions=12,
            mma=1,
            ldmatrix=1,
            global_loads={128: 2, 64: 1, 32: 1, 16: 1},
            streaming_loads={128: 1, 64: 1},
            async_copies={128: 1},
        ),
        "_Z6secondv": Sass(instructions=3, local_loads=2, local_stores=1),
    }
