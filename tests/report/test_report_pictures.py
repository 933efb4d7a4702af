from __future__ import annotations

import base64
import io
import re

import pytest
from data_samples import exif, picture
from PIL import Image

from mmrlhf_jax.data.media import MediaError
from mmrlhf_jax.groups import Group, Media, Turn
from mmrlhf_jax.report.pictures import album, pictures_of
from mmrlhf_jax.report.pictures import picture as shown


def embedded(html: str) -> Image.Image:
    (data,) = re.findall(r'src="data:image/[a-z]+;base64,([^"]*)"', html)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def group(*media: Media, name: str = "q") -> Group:
    return Group(name, (Turn("user", "What?"),), tuple(media), (), (), ())


def test_a_photo_is_made_small_and_drawn_anew():
    html = shown(picture(size=(4000, 1000), format="JPEG"), "a photo").html
    found = embedded(html)
    assert (found.format, found.size) == ("JPEG", (320, 80))
    assert 'class="photo"' in html
    assert 'alt="a photo"' in html
    assert len(html) < 60_000


def test_a_drawing_keeps_every_pixel():
    original = picture(size=(24, 24))
    found = embedded(shown(original, "").html)
    assert found.format == "PNG"
    assert found.tobytes() == Image.open(io.BytesIO(original)).tobytes()


def test_nothing_of_the_file_but_its_upright_pixels_is_passed_on():
    tags = exif(6)
    tags[0x010E] = "taken at home"
    found = embedded(shown(picture(size=(200, 100), format="JPEG", exif=tags), "").html)
    assert found.size == (100, 200)
    assert not found.getexif()
    assert "home" not in str(found.info)


def test_what_is_no_picture_is_refused():
    with pytest.raises(MediaError):
        shown(b"<svg onload='alert(1)'/>", "")


def test_of_a_video_the_frame_in_the_middle_stands_for_it():
    frames = tuple(picture(size=(10 + i, 10)) for i in range(5))
    (html,) = (each.html for each in pictures_of(group(Media("video", "clip", encoded=frames))))
    assert embedded(html).size == (12, 10)
    assert 'alt="Frame 3 of 5 of the video of the prompt q: clip"' in html


def test_of_many_pictures_the_first_few_are_shown_and_the_rest_counted():
    media = [Media("image", f"{i}.png", encoded=(picture(),)) for i in range(6)]
    *pictures, rest = (each.html for each in pictures_of(group(*media)))
    assert len(pictures) == 4
    assert "Picture 2 of 6" in pictures[1]
    assert "and 2 more pictures" in rest


def test_a_prompt_is_found_by_its_name_and_its_words():
    class Source:
        def with_media(self, row: int) -> Group:
            return group(Media("image", f"{row}.png", encoded=(picture(),)))

    found = album([(Source(), [group(name="a"), group(name="b")])])
    assert "1.png" in found.pictures("b", (("user", "What?"),))[0].html
    assert found.pictures("b", (("user", "Who?"),)) == []
    assert found.pictures("c", (("user", "What?"),)) == []
