"""Control vectors in the layout that llama.cpp reads, read back with the package that defines it."""

import gguf
import numpy as np
import pytest
import torch

import workbench as wb


def read(file) -> dict[int, np.ndarray]:
    """As llama.cpp's common_control_vector_load_one does: float32, one axis, layer from the name, 1 or more."""
    reader = gguf.GGUFReader(file)
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "controlvector"
    found = {}
    for tensor in reader.tensors:
        name, number = tensor.name.split(".")
        assert name == "direction" and int(number) >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(tensor.shape) == 1
        found[int(number)] = np.array(tensor.data)
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.INT32]
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == len(found)
    return found


def test_directions_are_added_after_their_blocks(llama, words, tmp_path):
    """What is read back, added to the output of block N as llama.cpp does, gives the logits of the recipe."""
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    recipe = wb.Recipe(
        [2 * wb.Add("resid_post.1", a), wb.Add(["resid_pre.2", "resid_post.2"], b), wb.Add("resid_post.0", a, 0.0)]
    )
    found = read(recipe.to_gguf(llama, tmp_path / "new" / "push.gguf"))
    assert sorted(found) == [1, 2]
    assert np.allclose(found[1], 2 * a + b, atol=1e-6) and np.allclose(found[2], b)
    hooks = [
        llama.hf.model.layers[n].register_forward_hook(lambda _, __, out, n=n: out + torch.tensor(found[n]))
        for n in found
    ]
    try:
        ids = llama.ids(words(6)[0])[None]
        with torch.no_grad():
            logits = llama.hf(ids).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.allclose(logits, llama.logits(words(6), recipe), atol=1e-4)


def test_what_llama_cpp_cannot_do_is_refused(llama, tmp_path):
    v = torch.ones(32)
    for one, said in ((wb.Add("resid_post.0", v), "resid_post.0 has no direction"), (wb.Add("resid_mid.1", v), "resid_mid.1 has no"),
                      (wb.Add("resid_post.1@-1", v), "every token"), (wb.Add("resid_post.1", v, phase="prompt"), "every token"),
                      (wb.Add("resid_post.1", v).gated(wb.Gate("resid_post.0@-1", v)), "every token"),
                      (wb.Add("resid_post.1", v, unit="norm"), "unit='raw'"), (wb.Zero("z.1.1"), "only adds"),
                      (wb.Add("resid_post.1", torch.ones(3)), "3 wide"), (wb.Add("resid_post.1", 0 * v), "nothing"),
                      (wb.Add("resid_post.9", v), "out of range")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            wb.Recipe([0 * one if said == "nothing" else one]).to_gguf(llama, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
