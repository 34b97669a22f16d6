"""A slab in another process: read whole, never written, and refused if it is none."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.kernels.ffn import ExpertWeights, pack
from moesaic.kernels.onednn import available
from moesaic.kernels.slabs.borrowed import borrow
from moesaic.kernels.slabs.layout import LayerLayout, SlabLayout, SlotTensor
from moesaic.kernels.slabs.slab import Slab, layer_layout
from tests.helpers.models.forms import KINDS, random_experts

KIND = KINDS["gated-bias"]


def experts(packed: bool) -> dict[int, ExpertWeights]:
    plain = random_experts(KIND, range(4))
    return {n: pack(KIND.form, one) for n, one in plain.items()} if packed else plain


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def slab(request: pytest.FixtureRequest) -> Iterator[Slab]:
    if request.param and not available():
        pytest.skip("this torch has no packed matrices")
    held = experts(request.param)
    made = Slab.create("lent", SlabLayout(dict.fromkeys((0, 3), layer_layout(4, held[0]))))
    for layer in (0, 3):
        for number in (0, 2):
            made.write(layer, number, held[number], version=1)
    yield made
    made.close()


def dense(weights: ExpertWeights) -> list[torch.Tensor]:
    return [t.to_dense() if t.is_mkldnn else t for t in weights.tensors().values()]


def test_a_borrower_reads_what_the_host_wrote(slab: Slab) -> None:
    reader = borrow(slab.lend())
    assert reader.layout.layers == slab.layout.layers
    assert reader.version(0, 2) == 1
    assert reader.version(0, 1) is None
    for mine, theirs in zip(dense(reader.view(3, 2)), dense(slab.view(3, 2)), strict=True):
        assert torch.equal(mine, theirs)
    assert reader.is_sound(3, 2)


def test_it_sees_what_changes_and_in_which_slot(slab: Slab) -> None:
    reader = borrow(slab.lend())
    before = reader.generation(0, 2)
    slab.free(0, 2)
    assert reader.version(0, 2) is None
    assert reader.generation(0, 2) == before + 2
    assert reader.generation(0, 0) == slab.generation(0, 0)


def test_its_memory_outlives_the_host(slab: Slab) -> None:
    reader = borrow(slab.lend())
    expected = [tensor.clone() for tensor in dense(slab.view(0, 0))]
    slab.close()
    gc.collect()
    for mine, theirs in zip(dense(reader.view(0, 0)), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_the_mapping_goes_with_its_last_tensor(slab: Slab) -> None:
    def mapped() -> int:
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("memfd:moesaic:lent" in line for line in lines)

    before = mapped()
    reader = borrow(slab.lend())
    expert = reader.view(0, 0)
    assert mapped() == before + 1
    del reader
    assert mapped() == before + 1
    assert all(bool(tensor.isfinite().all()) for tensor in dense(expert))
    del expert
    assert mapped() == before


# A write to what it may only read ends a process.
WRITER = """
import sys
from moesaic.kernels.slabs.borrowed import borrow
reader = borrow(int(sys.argv[1]))
reader.view(0, 0).tensors()["up_bias"].zero_()
"""


def test_a_borrower_cannot_write(slab: Slab) -> None:
    descriptor = slab.lend()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    before = dense(slab.view(0, 0))[2].clone()
    ended = subprocess.run(
        [sys.executable, "-c", WRITER, str(descriptor)], pass_fds=[descriptor], timeout=60
    )
    os.close(descriptor)
    assert ended.returncode == -11
    assert torch.equal(dense(slab.view(0, 0))[2], before)


# ---- what is no slab ----------------------------------------------------------------------------


def memory(content: bytes, *, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    descriptor = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def small() -> SlabLayout:
    return SlabLayout({0: LayerLayout(2, (SlotTensor("up", (4, 4), torch.float32),))})


def whole(layout: SlabLayout) -> bytes:
    return layout.header().ljust(layout.nbytes, b"\0")


def test_what_is_no_slab_is_refused(tmp_path: Path) -> None:
    content = whole(small())
    borrow(memory(content))
    for wrong, why in (
        (b"x" * 5000, "does not begin as a slab"),
        (content[:-1], "describes .* bytes, but the slab has"),
        (content[:8] + b"\xff" * 8 + content[16:], "more than the slab"),
        (content.replace(b'"float32"', b'"save"   '), "cannot be read"),
        (content.replace(b'"experts": 2', b'"experts": 0'), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=why):
            borrow(memory(wrong))
    with pytest.raises(ValueError, match="not sealed against shrinking"):
        borrow(memory(content, seals=fcntl.F_SEAL_GROW))
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be mapped"):
        borrow(os.open(file, os.O_RDONLY))


@given(st.data())
def test_a_manifest_with_other_bytes_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(whole(small()))
    header = len(small().header())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    before = descriptors()
    try:
        reader = borrow(memory(bytes(content)))
    except ValueError:
        pass
    else:
        assert reader.layout.nbytes == len(content)
        for layer, shape in reader.layout.layers.items():
            for tensor in shape.tensors:
                end = reader.layout.offset(layer, tensor, shape.experts - 1, 1) + tensor.nbytes
                assert end <= len(content)
        del reader
    assert descriptors() <= before + 1
