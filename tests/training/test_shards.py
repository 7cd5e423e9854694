"""Tensors that processes hold in parts, written by some processes and read by others."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_attnswap import UsageError
from hf_attnswap.training.shards import Parts, save_parts

WHOLE = torch.arange(7 * 3.0).view(7, 3)


class Sharded:
    """What a DTensor tells of itself: the part of this process, and where it begins."""

    def __init__(self, part, offsets):
        self.part, self.offsets = part, offsets

    def detach(self):
        return self

    def to_local(self):
        return self.part

    def __create_chunk_list__(self):
        return [SimpleNamespace(offsets=torch.Size(self.offsets))]


def rows(count, process, fill=None):
    """The part of a process: rows as FSDP2 shares them out, the last processes may have fewer or none."""
    size = -(-len(WHOLE) // count)
    at = min(process * size, len(WHOLE))
    part = WHOLE[at : at + size].clone()
    return Sharded(part if fill is None else part.fill_(fill), (at, 0))


@pytest.mark.parametrize("written, read", itertools.product((1, 2, 3, 5), (1, 2, 4)))
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path, written, read):
    for process in range(written):
        tensor = WHOLE if written == 1 else rows(written, process)
        save_parts({"w": tensor, "w.step": torch.tensor(5.0)}, tmp_path / f"{process}.safetensors")
    with Parts(sorted(tmp_path.iterdir())) as saved:
        assert saved.shapes() == {"w": (7, 3), "w.step": ()}
        for process in range(read):
            tensor = rows(read, process, fill=-1)
            saved.read_into("w", tensor)
            assert torch.equal(tensor.part, rows(read, process).part)
        whole, step = torch.zeros(7, 3), torch.zeros(())
        saved.read_into("w", whole)
        saved.read_into("w.step", step)
        assert torch.equal(whole, WHOLE) and step == 5


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"something else")
    with pytest.raises(UsageError, match="w.safetensors' is not a file of tensors of this package"):
        Parts([tmp_path / "w.safetensors"])
