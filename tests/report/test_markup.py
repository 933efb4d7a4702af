from __future__ import annotations

import pytest

from mmrlhf_jax.report.markup import clean, element, fragment, style

HOSTILE = '<script>alert("1")</script>'


def test_text_is_escaped_in_content_and_attributes():
    made = element("p", HOSTILE, title='" onload="x').html
    assert made == ('<p title="&quot; onload=&quot;x">&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;</p>')


def test_elements_nest_and_none_is_nothing():
    assert element("p", element("b", "a"), None, ["c", [element("i", 1)]], hidden=True, id=None).html == (
        "<p hidden><b>a</b>c<i>1</i></p>"
    )
    assert element("img", src="data:image/png;base64,AA", alt="x").html == (
        '<img src="data:image/png;base64,AA" alt="x">'
    )
    assert fragment("<", element("b")).html == "&lt;<b></b>"


@pytest.mark.parametrize(
    "attributes",
    [
        {"onclick": "x"},
        {"ONERROR": "x"},
        {"style": "color:red"},
        {"href": "javascript:alert(1)"},
        {"href": "https://example.org"},
        {"src": "https://example.org/a.png"},
        {"src": "data:image/svg+xml;base64,AA"},
        {"a b": "x"},
    ],
)
def test_what_could_run_or_load_is_refused(attributes):
    with pytest.raises(ValueError, match=r"."):
        element("a", **attributes)


def test_names_of_elements_cannot_come_from_data():
    with pytest.raises(ValueError, match="no element"):
        element("p><script", "x")
    with pytest.raises(ValueError, match="cannot hold"):
        style("</style><script>")


def test_what_cannot_be_seen_is_shown_as_its_code_point():
    assert clean("a\tb\r\nc") == "a\tb\nc"
    assert clean("a\x00\x1b[2J\u202eb\ud800\u2066") == "a⟨U+0000⟩⟨U+001B⟩[2J⟨U+202E⟩b⟨U+D800⟩⟨U+2066⟩"
    assert clean("né\u200d日本 😀") == "né\u200d日本 😀"
    element("p", "\ud800").html.encode()  # a page is UTF-8 whatever the data holds
