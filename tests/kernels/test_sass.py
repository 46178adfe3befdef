"""The helper that counts instructions, on machine code written by hand."""

from __future__ import annotations

import pytest
from sass import cost, kernels, main_loop

# A search of a table, then a loop of two 16-byte loads, a predicated branch out of it and back, and
# what follows the last exit. The loop is 0x50 to 0xc0, and takes 16 elements of bfloat16.
LOOPING = """
\t\tFunction : search_and_add
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x003fde0000000f00 */
        /*0010*/                   LDG.E.64 R2, desc[UR4][R4.64] ;   /* 0x0000000404027981 */
        /*0020*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ; /* 0x000000ff0200720c */
        /*0030*/               @P0 BRA 0x10 ;                        /* 0xfffffffc00f00947 */
        /*0040*/                   DADD R2, R2, R4 ;                 /* 0x0000000002027229 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0060*/              @!P1 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ; /* 0x00000004 */
        /*0070*/                   LDG.E.U8 R8, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
        /*0080*/                   F2F.F64.F32 R12, R4 ;             /* 0x000000040c047310 */
        /*0090*/                   DFMA R14, R12, R12, R14 ;         /* 0x0000000c0c0e722b */
        /*00a0*/                   MUFU.RSQ64H R3, R5 ;              /* 0x0000000500037308 */
        /*00b0*/                   CALL.REL.NOINC 0xe0 ;             /* 0x0000000000007944 */
        /*00c0*/               @P2 BRA 0x50 ;                        /* 0xfffffff400f02947 */
        /*00d0*/                   EXIT ;                            /* 0x000000000000794d */
        /*00e0*/                   BRA 0xe0;                         /* 0xfffffffc00fc7947 */
\t\t..........
\t\tFunction : nested
        /*0000*/                   S2R R8, SR_TID.X ;                /* 0x0000000000087919 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ; /* 0x00000004 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR6][R2.64] ; /* 0x00000004 */
        /*0030*/              @P2  BRA 0x10 ;                        /* 0xfffffff000f02947 */
        /*0040*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ; /* 0x00000004 */
        /*0050*/                   FADD R4, R4, R5 ;                 /* 0x0000000504047221 */
        /*0060*/                   FADD R4, R4, R6 ;                 /* 0x0000000604047221 */
        /*0070*/              @P3  BRA 0x40 ;                        /* 0xfffffff000f02947 */
        /*0080*/              @P0  BRA 0x0 ;                         /* 0xfffffff800f02947 */
        /*0090*/                   EXIT ;                            /* 0x000000000000794d */
\t\t..........
\t\tFunction : straight
        /*0000*/                   STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0000000402007986 */
        /*0010*/               @P0 EXIT ;                            /* 0x000000000000094d */
        /*0020*/                   EXIT ;                            /* 0x000000000000794d */
        /*0030*/                   NOP ;                             /* 0x0000000000007918 */
"""


def test_main_loop_is_the_one_that_moves_most() -> None:
    found = kernels(LOOPING)
    assert list(found) == ["search_and_add", "nested", "straight"]
    assert [hex(k.address) for k in main_loop(found["search_and_add"])] == [
        hex(a) for a in range(0x50, 0xD0, 0x10)
    ]


def test_a_loop_within_another_counts_without_it() -> None:
    each = cost(kernels(LOOPING)["nested"])
    assert (each.instructions, each.wide_bytes) == (3, 32)  # 0x10 to 0x30, not the longer 0x40


def test_bytes_that_are_no_whole_elements_are_refused() -> None:
    """As where the factors of a product were forgotten."""
    each = cost(kernels(LOOPING)["nested"])
    assert each.per_element(4) == 3 / 8
    with pytest.raises(ValueError, match=r"moves 32 bytes .* elements of 6 bytes"):
        each.per_element(6)


def test_cost_counts_doubles_calls_and_wide_bytes() -> None:
    each = cost(kernels(LOOPING)["search_and_add"])
    assert (each.instructions, each.doubles, each.calls, each.wide_bytes) == (8, 3, 1, 32)
    assert each.per_element(2) == 0.5
    assert each.per_element(2, elements=4) == 2


def test_without_a_loop_all_counts_up_to_the_exit() -> None:
    each = cost(kernels(LOOPING)["straight"])
    assert (each.instructions, each.wide_bytes) == (3, 16)
