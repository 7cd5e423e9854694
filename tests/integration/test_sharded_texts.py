"""Context parallelism gives each process a part of every text, and no variant but softmax exchanges what it needs."""

import pytest
import torch
from tiny_models import tiny, tokens

import hf_attnswap


def test_a_swapped_model_says_that_it_does_not_support_it():
    model = tiny()
    assert model.supports_context_parallel
    for name in ("elu", "relu_power"):
        hf_attnswap.swap(model, name)
        assert not model.supports_context_parallel and not model.model.supports_context_parallel
        hf_attnswap.restore(model)
        assert model.supports_context_parallel and model.model.supports_context_parallel
    assert tiny().supports_context_parallel


def test_a_loaded_conversion_says_so_too(tmp_path):
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path)
    assert not type(tiny()).from_pretrained(tmp_path).supports_context_parallel


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("layers", (None, [1]))
def test_a_call_under_a_mesh_that_shards_texts(tmp_path, layers):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    model, ids = hf_attnswap.swap(tiny(), "elu", layers=layers), tokens(16, batch=1)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with (
            context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]),
            pytest.raises(RuntimeError, match="holds a part of every text .context parallelism.*cp_size=1.*restore"),
        ):
            model(ids, use_cache=False)
    finally:
        torch.distributed.destroy_process_group()
    model(ids, use_cache=False)
