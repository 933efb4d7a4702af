"""The same prompt as transformers sees it and as we do: made pictures, and a processor's arrays."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mmrlhf_jax.data.media import decode
from mmrlhf_jax.groups import Group, Media, Origin, Response, Turn


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def group_of(*media: Media) -> Group:
    return Group(
        id="0",
        prompt=(Turn("user", "What is seen here?"),),
        media=media,
        responses=(Response("Noise."),),
        pairs=(),
        origins=(Origin("made.jsonl", 1),),
    )


def image(width: int, height: int, seed: int = 0) -> Media:
    return Media("image", f"{seed}.png", ((width, height),), encoded=(picture(width, height, seed),))


def video(frames: int, width: int, height: int) -> Media:
    return Media(
        "video", "v", ((width, height),) * frames, encoded=tuple(picture(width, height, n) for n in range(frames))
    )


def load_processor(directory: str):
    from transformers import AutoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    loaded = AutoProcessor.from_pretrained(directory)
    loaded.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)  # torchvision resizes otherwise
    return loaded


def processed(processor, group: Group) -> tuple[np.ndarray, dict]:
    """(prompt ids, pixels) as transformers makes them of text and pictures."""
    parts = [{"type": media.kind} for media in group.media] + [{"type": "text", "text": group.prompt[0].text}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    images = [Image.fromarray(decode(media.encoded[0])) for media in group.media]
    inputs = dict(processor(text=text, images=[images] if images else None, return_tensors="pt"))
    names = ("pixel_values", "image_sizes", "batch_num_images")
    return inputs["input_ids"][0].numpy(), {name: inputs[name] for name in names if name in inputs}
