import pytest

from pyproxy.rules.ebpf import FP, R0, R1, R2, R6, R7, Assembler


def written(write):
    asm = Assembler()
    write(asm)
    return asm.code().hex()


# As clang and the kernel's own samples have them, on a little-endian machine.
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        pytest.param(lambda a: a.set(R6, R1), "bf16000000000000", id="r6 = r1"),
        pytest.param(lambda a: a.set(R0, 1), "b700000001000000", id="r0 = 1"),
        pytest.param(lambda a: a.set(R0, -111), "b700000091ffffff", id="r0 = -111"),
        pytest.param(lambda a: a.compute(R2, "+", -8), "07020000f8ffffff", id="r2 += -8"),
        pytest.param(lambda a: a.compute(R1, "%", R7), "9f71000000000000", id="r1 %= r7"),
        pytest.param(lambda a: a.load(R2, R6, 24, 4), "6162180000000000", id="r2 = u32 at r6+24"),
        pytest.param(lambda a: a.load(R2, R6, 8), "7962080000000000", id="r2 = u64 at r6+8"),
        pytest.param(lambda a: a.load(R2, R6, 3, 1), "7162030000000000", id="r2 = u8 at r6+3"),
        pytest.param(lambda a: a.store(FP, -8, R0), "7b0af8ff00000000", id="u64 at fp-8 = r0"),
        pytest.param(lambda a: a.store(FP, -4, 1, 4), "620afcff01000000", id="u32 at fp-4 = 1"),
        pytest.param(
            lambda a: a.fetch_and_add(R7, 8, R1), "db17080001000000", id="atomic fetch and add"
        ),
        pytest.param(lambda a: a.map(R1, 5), "18110000050000000000000000000000", id="r1 = map"),
        pytest.param(lambda a: a.call(46), "850000002e000000", id="call"),
        pytest.param(lambda a: a.exit(), "9500000000000000", id="exit"),
    ],
)
def test_an_instruction_is_encoded_as_the_kernel_reads_it(write, expected):
    assert written(write) == expected


def test_a_jump_counts_the_slots_in_between_and_a_map_takes_two():
    asm = Assembler()
    asm.jump_if(R0, "==", 0, "end")
    asm.map(R1, 7)
    asm.jump_if(R0, ">=", R1, "end", bits=32)
    asm.jump("end")
    asm.label("end")
    asm.exit(0)
    slots = [asm.code()[at : at + 8].hex() for at in range(0, len(asm.code()), 8)]
    assert slots == [
        "1500040000000000",
        "1811000007000000",
        "0000000000000000",
        "3e10010000000000",
        "0500000000000000",
        "b700000000000000",
        "9500000000000000",
    ]


def test_a_label_that_is_nowhere_and_one_that_is_twice_are_mistakes():
    asm = Assembler()
    asm.jump("nowhere")
    with pytest.raises(KeyError):
        asm.code()
    asm.label("here")
    with pytest.raises(ValueError, match="label here exists twice"):
        asm.label("here")
