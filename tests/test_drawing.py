"""Maps become pictures: render, overlay, labels, contact sheets, frames of several classes."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pictures import box, random_flow, random_picture, solid

from daam_core import block_labels, contact_sheet, overlay, render, side_by_side


def plain_render(A, size):
    m, frames = A[-1].max(), []
    for A_b in A:
        x = 1 / (1 + np.exp(-5 * A_b / m)) - 0.5
        x = (x - x.min()) / (x.max() - x.min())
        heat = np.floor(255 * x).astype(np.uint8)
        frames.append(heat if size is None else cv2.resize(heat, size[::-1], interpolation=cv2.INTER_LINEAR))
    return np.stack(frames)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "grid, size", [((14, 14), (224, 224)), ((4, 7), (61, 130)), ((7, 4), None), ((9, 9), (5, 6)), ((1, 2), (8, 16))]
)
def test_render_is_the_formula(grid, size, as_tensor):
    flow = random_flow(5, *grid)
    heat = render(torch.from_numpy(flow).requires_grad_() if as_tensor else flow, size)
    assert heat.dtype == np.uint8 and heat.shape == (5, *(size or grid))
    assert np.array_equal(heat, plain_render(flow, size))
    assert heat.max() > 200 or size == (5, 6)  # at a smaller size the peak is averaged away


def test_render_spans_all_grey_levels():
    heat = render(random_flow())
    assert (heat.min((1, 2)) == 0).all() and (heat.max((1, 2)) == 255).all()


def test_render_of_flat_maps_is_zero():
    flow = np.stack([np.zeros((3, 3)), np.full((3, 3), 2.0), np.eye(3)]).astype(np.float32)
    with np.errstate(all="raise"):  # 0 / 0, cast to uint8, may be zero by chance
        heat = render(flow, (6, 6))
        assert not heat[:2].any() and heat[2].max() == 255
        assert not render(np.zeros((2, 3, 3), np.float32)).any()
        assert not render(np.full((2, 3, 3), 7.0, np.float32)).any()


def test_render_draws_negative_values_as_zero():
    flow = random_flow(4) - 0.8
    given = flow.copy()
    with np.errstate(all="raise", under="ignore"):
        heat = render(flow)
        assert np.array_equal(heat, plain_render(flow.clip(min=0), None)) and heat.max() == 255
        assert not heat[flow <= 0].any() and (flow < 0).any() and np.array_equal(flow, given)
        assert not render(-random_flow()).any()
        flow[-1] = -1  # nothing in A_L speaks for the class
        assert not render(flow).any()


def test_render_takes_half_precision():
    flow = torch.from_numpy(random_flow()).half()
    assert np.array_equal(render(flow), plain_render(flow.float().numpy(), None))


@pytest.mark.parametrize(
    "flow, match",
    [
        (np.zeros((3, 3), np.float32), r"^accumulated: expected the maps \(L, h, w\) of one image, got \(3, 3\)"),
        (torch.zeros(1, 2, 3, 3), "^accumulated: expected"),
        (np.zeros((0, 3, 3), np.float32), "^accumulated: expected"),
        (np.full((2, 3, 3), np.nan, np.float32), "^accumulated: has NaN or infinite values"),
        (torch.full((2, 3, 3), torch.inf), "^accumulated: has NaN or infinite values"),
    ],
)
def test_render_errors(flow, match):
    with pytest.raises(ValueError, match=match):
        render(flow)


@pytest.mark.parametrize("as_pil", [False, True], ids=["array", "PIL"])
@pytest.mark.parametrize("size", [(32, 48), (56, 40)])
def test_overlay_is_the_formula(size, as_pil):
    picture, heat = random_picture(*size), render(random_flow(3), (8, 12))
    frames = overlay(Image.fromarray(picture) if as_pil else picture, heat)
    assert len(frames) == 3
    for frame, grey in zip(frames, heat):
        grey = cv2.resize(grey, size[::-1], interpolation=cv2.INTER_LINEAR)
        colour = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
        assert frame.mode == "RGB" and frame.size == size[::-1]
        assert np.array_equal(frame, np.clip(0.4 * colour + 0.8 * picture, 0, 255).astype(np.uint8))


def test_overlay_colours_run_from_blue_to_red():
    cold, hot = overlay(solid("black", (2, 2)), np.array([[[0]], [[255]]], np.uint8))
    assert cold.getpixel((0, 0)) == (0, 0, 51) and hot.getpixel((0, 0)) == (51, 0, 0)  # JET ends at half intensity


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_overlay_takes_any_pil_image(mode):
    image = Image.fromarray(random_picture(16, 16)).convert(mode)
    heat = render(random_flow(2))
    for frame, same in zip(overlay(image, heat), overlay(image.convert("RGB"), heat), strict=True):
        assert np.array_equal(frame, same)


def test_overlay_labels_stay_in_the_corner():
    picture, heat = random_picture(140, 210), render(random_flow(3))
    plain, labelled = overlay(picture, heat), overlay(picture, heat, block_labels(3))
    for before, after in zip(plain, labelled):
        ys, xs = np.nonzero((np.asarray(before) != np.asarray(after)).any(2))
        assert len(ys) > 0 and ys.max() < 140 // 5 and xs.max() < 210 // 4
    assert not np.array_equal(labelled[0], labelled[1])
    assert np.array_equal(picture, random_picture(140, 210))


def test_block_labels():
    assert block_labels(3) == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize(
    "picture, heat, labels, match",
    [
        (np.zeros((8, 8), np.uint8), np.zeros((2, 4, 4), np.uint8), None, "^image: expected"),
        (np.zeros((8, 8, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), None, r"^image: .* got \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4), np.uint8), None, "^heat: expected"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4, 4), np.float32), None, "^heat: expected .* float32"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4, 4), np.uint8), ["1"], "^labels: expected one for each of 2"),
    ],
)
def test_overlay_errors(picture, heat, labels, match):
    with pytest.raises(ValueError, match=match):
        overlay(picture, heat, labels)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (30, 30)])
@pytest.mark.parametrize("columns, rows", [(3, 2), (4, 2), (6, 1), (1, 5)])
def test_contact_sheet_shows_the_picture_and_every_frame(columns, rows, size):
    red = solid((200, 0, 0), size)
    frames = [solid((10 * b, 200, 100), size) for b in range(1, 6)]
    page = contact_sheet(red, frames, "a caption", columns, side=60)
    top, left, *shape = box(page, (200, 0, 0))
    corners = []
    for b in range(1, 6):
        y, x, *same = box(page, (10 * b, 200, 100))
        corners.append((y, x))
        assert same == shape and max(shape) == 60 and shape[0] * size[0] == shape[1] * size[1]
    assert corners == sorted(corners)  # row by row
    assert len({y for y, _ in corners}) == rows and len({x for _, x in corners}) == min(columns, 5)
    assert corners[0][0] == top and corners[0][1] > left + shape[1]


def test_contact_sheet_writes_the_caption_below_the_picture():
    def dark(caption):
        page = np.asarray(contact_sheet(solid("red"), [solid("lime")], caption, side=100))
        return np.nonzero((page < 100).all(2))[0], box(page, (255, 0, 0)), len(page)

    rows, *_ = dark("")
    assert not len(rows)
    heights = []
    for lines in (1, 4, 9):
        rows, (top, _, height, _), end = dark("\n".join(["tench 0.93"] * lines))
        assert rows.min() > top + height and rows.max() < end - 2  # nothing is cut off
        heights.append(np.ptp(rows))
    assert heights == sorted(set(heights))


def test_contact_sheet_of_several_classes_is_in_the_scale_of_the_picture():
    colours = [(200, 10 * b, 100) for b in range(4)]
    frames = side_by_side([[solid(colour) for colour in colours], [solid("lime")] * 4])
    page = contact_sheet(solid("red"), frames, "", 2, side=40)
    _, left, height, width = box(page, (255, 0, 0))
    boxes = [box(page, colour) for colour in colours]
    assert {(h, w) for _, _, h, w in boxes} == {(height, width)} == {(20, 40)}
    (y0, x0, *_), (y1, x1, *_), (y2, x2, *_), _ = boxes
    assert y0 == y1 < y2 and left + width < x0 == x2
    lime = np.nonzero((np.asarray(page)[y0] == (0, 255, 0)).all(1))[0]
    between = lime[lime < x1].max(), lime[lime < x1].min()
    assert x1 - between[0] > 2 * (between[1] - (x0 + width)) > 0  # frames are further apart than panels


def test_side_by_side():
    red, lime, blue = ([solid(colour, (30, 40)), solid("black", (30, 40))] for colour in ("red", "lime", "blue"))
    pages = side_by_side([red, lime, blue])
    assert len(pages) == 2 and len({page.size for page in pages}) == 1
    gap = (pages[0].width - 90) // 2
    assert gap >= 2 and pages[0].height == 40
    for k, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert box(pages[0], colour) == (0, k * (30 + gap), 40, 30)
    assert (np.asarray(pages[1])[:, 30 : 30 + gap] == 255).all() and not np.asarray(pages[1])[:, :30].any()


def test_side_by_side_with_titles():
    panels = [[solid("red", (120, 80))], [solid("lime", (120, 80))]]
    plain, titled, cut = (side_by_side(panels, t)[0] for t in (None, ("cup", "i"), ("cup" * 50, "i" * 500)))
    top = titled.height - plain.height
    assert top > 10 and np.array_equal(np.asarray(titled)[top:], np.asarray(plain))  # the pictures stay visible
    assert cut.size == titled.size
    for page, widest in ((titled, 40), (cut, 120)):
        for left in (0, page.width - 120):
            columns = np.nonzero((np.asarray(page)[:top, left : left + 120] < 128).any((0, 2)))[0]
            assert 0 < np.ptp(columns) + 1 <= widest
            assert abs(columns.min() + columns.max() - 119) <= 12  # in the middle of the panel
        assert (np.asarray(page)[:top, 120:-120] == 255).all()


@pytest.mark.parametrize(
    "panels, titles, match",
    [
        ([], None, "^panels: expected the same number of frames for every class, got"),
        ([[solid("red")], []], None, r"^panels: .*\[1, 0\]"),
        ([[solid("red")]], ["a", "b"], "^titles: expected one for each of 1 classes, got 2"),
    ],
)
def test_side_by_side_errors(panels, titles, match):
    with pytest.raises(ValueError, match=match):
        side_by_side(panels, titles)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong arguments
# ----------------------------------------------------------------------------------------------------------------------

MAPS = torch.rand(2, 3, 3)
HEAT = np.zeros((2, 4, 4), np.uint8)
FRAMES = [solid("red"), solid("lime")]


@pytest.mark.parametrize(
    "maps, error, got",
    [
        (MAPS.to_sparse(), ValueError, "dense real numbers, got torch.float32, torch.sparse_coo, on cpu"),
        (MAPS.to("meta"), ValueError, "dense real numbers, got .* on meta"),
        (MAPS.cfloat(), ValueError, "dense real numbers, got torch.complex64"),
        (MAPS.bool(), ValueError, "dense real numbers, got torch.bool"),
        (MAPS.numpy() + 1j, ValueError, "dense real numbers, got complex64"),
        (MAPS.numpy() > 0, ValueError, "dense real numbers, got bool"),
        (np.full((2, 3, 3), None), ValueError, "dense real numbers, got object"),
        (np.full((2, 3, 3), "1"), ValueError, "dense real numbers, got <U1"),
        ([[1.0], [1.0, 2.0]], ValueError, r"dense real numbers, got \[\[1.0\], \[1.0, 2.0\]\]"),
        ([], ValueError, r"the maps \(L, h, w\) of one image, got \(0,\)"),
        ("maps.npz", TypeError, "the maps .* got str"),
        (None, TypeError, "the maps .* got NoneType"),
    ],
)
def test_render_of_something_else(maps, error, got):
    with pytest.raises(error, match=f"^accumulated: expected {got}"):
        render(maps)


@pytest.mark.parametrize(
    "value, match", [(1e300, "has NaN or infinite"), (1e38, "has values beyond 6.8e37, .*; scale the maps down")]
)
def test_render_of_values_that_are_too_large(value, match):
    maps = np.full((2, 3, 3), value)
    maps[:, 0, 0] = 0
    with pytest.raises(ValueError, match=f"^accumulated: {match}"):
        render(maps)
    assert render(maps / value * 1e37).max() == 255


def test_render_takes_nested_lists_and_integers():
    assert np.array_equal(render([[[0, 1], [2, 3]]]), render(np.arange(4.0).reshape(1, 2, 2)))


@pytest.mark.parametrize(
    "size, error, match",
    [
        ((0, 0), ValueError, "^size: expected at least 1, got 0$"),
        ((5, -1), ValueError, "^size: expected at least 1, got -1$"),
        (
            (10**6, 10**6),
            ValueError,
            "^size: 2 x 1000000 x 1000000 bytes are more than 4 GiB; make",
        ),
        ((1, 2**40), ValueError, "^size: .* bytes are more than 4 GiB"),
        ((5,), ValueError, "^size: expected two integers, got 1$"),
        ((5, 5, 3), ValueError, "^size: expected two integers, got 3$"),
        (5, TypeError, "^size: expected two integers, got int$"),
        ("ab", TypeError, "^size: expected two integers, got str$"),
        ({3: 1, 4: 1}, TypeError, "^size: expected two integers, got dict$"),
        ((1.5, 2), TypeError, "^size: expected an integer, got 1.5$"),
        ((float("nan"), 2), TypeError, "^size: expected an integer, got nan$"),
        ((True, 2), TypeError, "^size: expected an integer, got True$"),
        ((None, 2), TypeError, "^size: expected an integer, got None$"),
    ],
)
def test_render_in_a_wrong_size(size, error, match):
    with pytest.raises(error, match=match):
        render(MAPS, size)


@pytest.mark.parametrize("size", [[6, 4], np.array([6, 4]), torch.tensor([6, 4]), torch.Size([6, 4])])
def test_render_takes_any_pair_of_integers(size):
    assert np.array_equal(render(MAPS, size), render(MAPS, (6, 4)))


@pytest.mark.parametrize(
    "image, heat, labels, error, match",
    [
        ("a.png", HEAT, None, TypeError, r"^image: expected a PIL image or an array \(H, W, 3\) of uint8, got str$"),
        (torch.zeros(3, 4, 4), HEAT, None, TypeError, "^image: .* got Tensor$"),
        (solid("red", (0, 4)), HEAT, None, ValueError, "^image: .* got 0 x 4 pixels$"),
        (np.zeros((0, 4, 3), np.uint8), HEAT, None, ValueError, r"^image: .* got \(0, 4, 3\) uint8$"),
        (np.zeros((4, 4, 3)), HEAT, None, ValueError, "^image: .* float64$"),
        (solid("red"), None, None, TypeError, "^heat: expected an array .* got NoneType$"),
        (solid("red"), torch.from_numpy(HEAT), None, TypeError, "^heat: .* got Tensor$"),
        (solid("red"), HEAT[:0], None, ValueError, "^heat: expected"),
        (solid("red"), HEAT, "ab", TypeError, "^labels: expected one for each of 2 frames, got str$"),
        (solid("red"), HEAT, [], ValueError, "^labels: expected one for each of 2 frames, got 0$"),
        (solid("red"), HEAT, [1, 2], TypeError, "^labels: expected texts, got int$"),
        (solid("red"), HEAT, 5, TypeError, "^labels: .* got int$"),
    ],
)
def test_overlay_of_something_else(image, heat, labels, error, match):
    with pytest.raises(error, match=match):
        overlay(image, heat, labels)


def test_overlay_of_a_file_that_is_cut(tmp_path):
    solid("red", (400, 400)).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:500])
    with (
        Image.open(tmp_path / "a.bmp") as image,
        pytest.raises(ValueError, match="^image: cannot be read: .*trunc"),
    ):
        overlay(image, HEAT)


def test_a_picture_in_16_bits_looks_like_its_twin_in_8():
    values = np.linspace(0, 255, 800).round().reshape(20, 40).astype(np.uint8)
    deep, flat = Image.fromarray(values.astype(np.uint16) * 257), Image.fromarray(values)
    for frame, twin in zip(overlay(deep, HEAT), overlay(flat, HEAT), strict=True):
        assert np.array_equal(frame, twin)
    assert np.array_equal(contact_sheet(deep, [deep]), contact_sheet(flat, [flat]))
    assert np.array_equal(side_by_side([[deep]])[0], flat.convert("RGB"))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"columns": 0}, ValueError, "^columns: expected at least 1, got 0$"),
        ({"columns": 1.5}, TypeError, "^columns: expected an integer, got 1.5$"),
        ({"columns": True}, TypeError, "^columns: expected an integer, got True$"),
        ({"side": 0}, ValueError, "^side: expected at least 1, got 0$"),
        ({"side": -288}, ValueError, "^side: expected at least 1, got -288$"),
        ({"side": 10**7}, ValueError, "^side: .* bytes are more than 4 GiB; make the picture smaller$"),
        ({"side": "288"}, TypeError, "^side: expected an integer, got '288'$"),
        ({"caption": None}, TypeError, "^caption: expected a text, got NoneType$"),
        ({"frames": []}, ValueError, "^frames: there are none; pass at least one$"),
        ({"frames": None}, TypeError, "^frames: expected a sequence of PIL images, got NoneType$"),
        ({"frames": ["a.png"]}, TypeError, "^frames: expected a PIL image"),
        (
            {"frames": [*FRAMES, solid("red", (3, 3))]},
            ValueError,
            "^frames: expected one size for all, got 40 x 20",
        ),
        ({"image": None}, TypeError, "^image: expected a PIL image"),
    ],
)
def test_contact_sheet_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        contact_sheet(**{"image": solid("red"), "frames": FRAMES} | arguments)


@pytest.mark.parametrize(
    "panels, titles, error, match",
    [
        (None, None, TypeError, "^panels: expected for each class its frames, got NoneType$"),
        (FRAMES, None, TypeError, "^panels: expected for each class its frames, got Image$"),
        ([[]], None, ValueError, r"^panels: expected the same number of frames for every class, got \[0\]$"),
        (
            [FRAMES, [solid("red", (3, 3))] * 2],
            None,
            ValueError,
            "^panels: expected one size for all, got 40 x 20",
        ),
        ([["a.png"]], None, TypeError, "^panels: expected a PIL image"),
        ([FRAMES, FRAMES], "ab", TypeError, "^titles: expected one for each of 2 classes, got str$"),
        ([FRAMES, FRAMES], ["a", None], TypeError, "^titles: expected texts, got NoneType$"),
    ],
)
def test_side_by_side_of_something_else(panels, titles, error, match):
    with pytest.raises(error, match=match):
        side_by_side(panels, titles)


@pytest.mark.parametrize("blocks, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_block_labels_errors(blocks, error):
    with pytest.raises(error, match="^blocks: expected"):
        block_labels(blocks)


# ----------------------------------------------------------------------------------------------------------------------
# Names that people have
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, shown", [("a\x1b[1m", r"a\x1b[1m"), ("a\tb", r"a\tb"), ("\ue000\u0378", "??")])
def test_labels_titles_and_captions_are_legible(text, shown):
    pages = [
        (*overlay(solid("grey", (80, 60)), HEAT[:1], [words]), *side_by_side([FRAMES, FRAMES], [words, "a"]),
         contact_sheet(solid("red"), FRAMES, words))
        for words in (text, shown)
    ]  # fmt: skip
    for page, same in zip(*pages, strict=True):
        assert np.array_equal(page, same)


def test_every_line_of_a_caption_has_its_own_font():
    plain, both = (np.asarray(contact_sheet(solid("red"), FRAMES, caption)) for caption in ("cup 1\n ", "cup 1\nкот 2"))
    changed = np.nonzero((plain != both).any((1, 2)))[0]
    assert len(changed) and changed.min() > len(plain) - 8 - 24 - 8  # the first line is drawn as it was
