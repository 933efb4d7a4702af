"""An adapter of ours loads in peft over the base model with the logits of our merged export; peft's own loads here."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from small_world import ROOT, run
from torchvision_shim import mend_torchvision

from mmrlhf_jax.objectives import DPO
from mmrlhf_jax.training.recipe import LoraConfig, read_recipe
from mmrlhf_jax.training.train import train

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
mend_torchvision()  # peft imports transformers' image code
peft = pytest.importorskip("peft")


def transformer(directory):
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model, directory):
    """Of a question about a picture: tower, projector and decoder take part."""
    from transformers import AutoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    processor = AutoProcessor.from_pretrained(directory)
    processor.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3)).astype(np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        return model(**processor(text=text, images=picture, return_tensors="pt")).logits.numpy()


@pytest.fixture(scope="module")
def lora_run(small_world):
    tiny = read_recipe(ROOT / "configs" / "tiny.py")
    recipe = dataclasses.replace(
        tiny,
        objective=DPO(),
        model=small_world.model,
        dataset=small_world.dataset,
        reference="lora_off",
        lora=LoraConfig(rank=4, alpha=8.0),
        data=dataclasses.replace(tiny.data, max_steps=3, max_buckets=1),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=3e-2, warmup=0.0),
    )
    output = small_world.directory / "lora-peft"
    train(recipe, output)
    run("export", output, "--output", output / "merged", "--dtype", "float32")
    run("export", output, "--output", output / "adapter", "--adapter")
    return output


def test_peft_loads_our_adapter_with_equal_logits(small_world, lora_run):
    bare = logits(transformer(small_world.model), small_world.model)
    adapted = peft.PeftModel.from_pretrained(transformer(small_world.model), str(lora_run / "adapter")).eval()
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(names) == 2 * (7 * 2 + 2)  # every layer's seven kernels and the projector's two: none in the tower
    assert not any("vision_tower" in name for name in names)
    theirs = logits(adapted, small_world.model)
    ours = logits(transformer(lora_run / "merged"), lora_run / "merged")
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert np.abs(theirs - bare).max() > 1e-2


def test_an_adapter_that_peft_wrote_is_a_model_here(small_world, tmp_path):
    """On two kinds of kernels only, scaled by alpha / sqrt(rank)."""
    settings = peft.LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, init_lora_weights=False,
        target_modules=r".*language_model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)",
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformer(small_world.model), settings).eval()
    theirs = logits(adapted, small_world.model)
    adapted.save_pretrained(tmp_path / "adapter")
    run("export", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "float32")
    ours = logits(transformer(tmp_path / "merged"), tmp_path / "merged")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - logits(transformer(small_world.model), small_world.model)).max() > 1e-2
