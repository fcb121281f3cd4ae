import pytest

from webssl_jax.plan import bundles

# as libtpu 0.0.42 writes them: number, what a bundle begins, the loops around it, instructions
LINES = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s1 = sld [smem:[#allocation0]] /* core id */ }
   0x1   :  { %8 = vpush.ccrf %v6 }
   0x2 LB: > { %s2 = sadd.s32 1, %s3 }
   0x3   : > { %v4 = vadd.f32 %v5, %v6  ;;  %188 = sbr.rel (%p5) target = $region20 }
   0x4   : > {}
window_bounds: (1, 34, 1)
   0x5 PF: > { %p31 = scmp.ge.s32.totalorder %s34, 146 /* loop exit test */ }
   0xa   :  { %20 = vsyncpa [#allocation7], 1 }
"""


def test_a_loop_counts_as_often_as_it_runs_and_what_is_around_it_once():
    assert bundles.count(LINES) == 3 + 4 * 146


def test_an_operation_without_a_loop_counts_once():
    assert bundles.count("\n".join(LINES.splitlines()[:7])) == 2


@pytest.mark.parametrize(
    "old, new", [("   0x4   : >", "   0x4   : > >"), (" /* loop exit test */", "")]
)
def test_loops_of_unknown_length_and_within_others_are_no_number(old, new):
    assert bundles.count(LINES.replace(old, new)) is None
