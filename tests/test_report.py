"""The report page: what it says, and what it does in a browser."""

import base64
import configparser
import io
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.utils import Bunch

import skanomaly
from skanomaly import LoadImages, ThresholdCalibrator, make_pipeline
from skanomaly.inspection import find_regions, inspect, write_report

# names that would run a script if they were not text
BAD_NAMES = [
    "</script><script>window.ran = 1</script>",
    '"\'><img src=x onerror="window.ran = 1">',
    "<b>&amp; $title ${rows}",
]


def report_of(images, threshold=0.5):
    """Return a report whose maps are the brightness."""
    maps = (np.asarray(images, float).mean(axis=-1) / 255).astype(np.float32)
    scores = -maps.max(axis=(1, 2)).astype(float)
    labels = np.where(scores < -threshold, -1, 1)
    masks = (maps > threshold) & (labels == -1)[:, None, None]
    return Bunch(
        scores=scores,
        labels=labels,
        offset=-threshold,
        p_values=np.linspace(0.01, 1, len(images)),
        maps=maps,
        masks=masks,
        map_threshold=threshold,
        regions=find_regions(masks, maps),
    )


def squares(n=6, size=32):
    """Return grey images, of which every second has a bright square."""
    images = np.full((n, size, size, 3), 60, np.uint8)
    for number in range(0, n, 2):
        images[number, 8:20, 4:14] = 200 + 5 * number
    return images


class Page(HTMLParser):
    """The elements of a page: tag, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        self.open.append(self.elements[-1])
        if tag in ("meta", "wbr", "input"):
            self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def find(self, tag, **wanted):
        """Return attributes and text of the elements of a tag."""
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag
            and all(attributes.get(key) == value for key, value in wanted.items())
        ]


def decoded(uri):
    """Return the picture in a data URI."""
    head, _, content = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_table_is_the_report_sorted_by_score(tmp_path):
    images = squares()
    report = report_of(images)
    write_report(report, images, tmp_path / "page.html", title="A & B")
    page = Page(tmp_path / "page.html")
    assert not page.open
    order = np.argsort(report.scores, kind="stable")
    assert [text for _, text in page.find("bdi")] == [f"image {i}" for i in order]
    assert [text for _, text in page.find("h1")] == ["A & B"]
    kinds = [attributes["class"] for attributes, _ in page.find("tbody")]
    assert kinds == [
        "anomalous" if label == -1 else "normal" for label in report.labels[order]
    ]
    values = [
        float(attributes["data-value"])
        for attributes, _ in page.find("td")
        if "data-value" in attributes
    ]
    counts = np.bincount(report.regions["image"], minlength=len(images))
    expected = np.stack([report.scores, report.p_values, counts], axis=1)[order]
    np.testing.assert_array_equal(np.reshape(values, (-1, 3)), expected)
    facts = [text for _, text in page.find("dd")]
    assert facts == ["6", "3 (50.0%)", "-0.5"]
    scopes = [attributes.get("scope") for attributes, _ in page.find("th")]
    assert scopes == ["col"] * 5 + ["row"] * 6


def test_the_bars_of_the_histogram_hold_all_images(tmp_path):
    images = squares(7)
    write_report(report_of(images), images, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    for kind, n in (("anomalous", 4), ("normal", 3)):
        bars = page.find("rect", **{"class": kind})
        assert sum(int(attributes["height"]) for attributes, _ in bars) == n
    ((line, _),) = page.find("line")
    bars = page.find("rect", **{"class": "anomalous"})
    assert all(float(bar["x"]) < float(line["x1"]) for bar, _ in bars)
    bars = page.find("rect", **{"class": "normal"})
    assert all(float(bar["x"]) + 1 > float(line["x1"]) for bar, _ in bars)


def test_one_image_at_the_threshold_has_a_page(tmp_path):
    images = squares(1)
    report = report_of(images)
    for offset in (report.scores[0], np.nextafter(report.scores[0], 0)):
        report.offset = offset
        write_report(report, images, tmp_path / "page.html")
        bars = Page(tmp_path / "page.html").find("rect", height="1")
        assert len(bars) == 1


def test_photographs_maps_and_boxes_fit_the_files(tmp_path, small):
    paths, images = [], squares(12)
    images += np.random.default_rng(0).integers(0, 40, images.shape, np.uint8)
    for number, image in enumerate(images):
        folder = tmp_path / ("good" if number % 2 else "bad")
        folder.mkdir(exist_ok=True)
        paths.append(folder / f"{number}.png")
        size = (1280, 960) if number == 0 else (96, 64)
        Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(paths[-1])
    pipeline = make_pipeline(LoadImages(size=32), small("SPADE", image_score="max"))
    calibrator = ThresholdCalibrator(pipeline, false_positive_rate=0.2, cv=2)
    report = inspect(calibrator.fit(paths[1::2]), paths)
    assert report.offset == calibrator.offset_
    assert report.map_threshold == calibrator.map_threshold_
    assert 0 in report.regions["image"]

    write_report(report, paths, tmp_path / "page.html")

    page = Page(tmp_path / "page.html")
    names = [text for _, text in page.find("bdi")]
    assert names[list(np.argsort(report.scores)).index(0)] == "bad/0.png"
    ((photograph, _),) = page.find("image", id="photo-0")
    assert (photograph["width"], photograph["height"]) == ("1280", "960")
    picture = decoded(photograph["href"])
    assert picture.shape == (720, 960, 3)
    expected = Image.open(paths[0]).resize((960, 720))
    assert abs(picture.astype(float) - np.asarray(expected)).mean() < 4
    boxes = {
        tuple(int(box[side]) for side in ("x", "y", "width", "height"))
        for box, _ in page.find("rect", **{"class": "found box"})
    }
    assert boxes == {
        (r["left"], r["top"], r["right"] - r["left"], r["bottom"] - r["top"])
        for r in report.regions
    }


def test_maps_below_the_threshold_are_dark(tmp_path):
    images = squares(2)
    write_report(report_of(images), images, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    first, second = (
        decoded(attributes["href"])
        for attributes, _ in page.find("image", opacity="0.6")
    )
    assert second.mean() < 70
    inside, outside = first[10:18, 6:12], first[24:, 18:]
    assert inside.mean() > 120 > 70 > outside.mean()


def test_equal_reports_give_equal_pages(tmp_path):
    images = squares()
    report = report_of(images)
    pages = [tmp_path / "1.html", tmp_path / "2.html", tmp_path / "3.html"]
    for path, date in zip(pages, (None, None, "2031-05-04"), strict=True):
        write_report(report, images, path, date=date)
    first, second, dated = (path.read_text(encoding="utf-8") for path in pages)
    assert first == second
    assert "2031-05-04" not in first
    assert dated.replace('<p class="soft">2031-05-04</p>', "") == first


@pytest.mark.parametrize("kind", ["grey", "one channel", "float", "tensor"])
def test_images_of_all_kinds_look_the_same(tmp_path, kind):
    images = squares(3)
    report = report_of(images)
    given = {
        "grey": lambda: images[..., 0],
        "one channel": lambda: images[..., :1],
        "float": lambda: images / 255,
        "tensor": lambda: pytest.importorskip("torch").from_numpy(images),
    }[kind]()
    write_report(report, images, tmp_path / "rgb.html")
    write_report(report, given, tmp_path / "page.html")
    pages = [tmp_path / "rgb.html", tmp_path / "page.html"]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_detector_without_maps_has_a_page(tmp_path):
    images = squares(3)
    whole = report_of(images)
    report = Bunch(scores=whole.scores, labels=whole.labels, offset=whole.offset)
    write_report(report, images, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [text for _, text in page.find("th", scope="col")] == [
        *("Name", "Label", "Score")
    ]
    assert len(page.find("figure")) == 1 + 3


def test_photographs_share_the_bytes_of_a_page(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (20, 900, 900), np.uint8)
    report = report_of(images[:, ::30, ::30, None], threshold=2.0)
    write_report(report, images, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    photographs = [
        attributes["href"]
        for attributes, _ in page.find("image")
        if attributes.get("id", "").startswith("photo")
    ]
    assert 2e6 < sum(map(len, photographs)) < 10.1e6
    assert decoded(photographs[0]).shape[0] < 900


def test_of_many_regions_those_with_the_highest_peaks_are_drawn(tmp_path):
    images = np.zeros((1, 40, 40, 3), np.uint8)
    images[0, ::2, ::2] = np.linspace(130, 255, 400).reshape(20, 20, 1)
    report = report_of(images)
    assert len(report.regions) == 400
    write_report(report, images, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    boxes = page.find("rect", **{"class": "found box"})
    assert len(boxes) == 30
    assert min(int(box["y"]) for box, _ in boxes) == 36
    captions = [text for _, text in page.find("figcaption")]
    assert "400 regions, boxes around the 30 with the highest peaks" in captions


def test_what_does_not_fit_is_named_and_an_older_page_stays(tmp_path):
    images = squares()
    report = report_of(images)
    page = tmp_path / "page.html"
    page.write_text("older")
    clips = Bunch(**{**report, "maps": report.maps[:, None]})
    shifted = report.regions.copy()
    shifted["right"] += 100
    for arguments, error, match in [
        ((report, images[:5]), ValueError, "report is of 6 images, but 5 came"),
        ((report, images[..., :2]), ValueError, r"images must be .*\(6, 32, 32, 2\)"),
        ((report, images.astype(int)), ValueError, "images must be uint8 .* int64"),
        ((clips, images), ValueError, r"those of clips have the shape \(6, 1, 32, 32"),
        (
            (Bunch(**{**report, "regions": shifted}), images),
            ValueError,
            "reach beyond its 32 x 32 pixels.*give the paths",
        ),
        ((report, [f"no-{i}.png" for i in range(6)]), FileNotFoundError, "no-4.png"),
    ]:
        with pytest.raises(error, match=match):
            write_report(*arguments, page)
    with pytest.raises(ValueError, match="names must be of 6 images, got 1"):
        write_report(report, images, page, names=["a"])
    assert page.read_text() == "older"
    assert list(tmp_path.iterdir()) == [page]
    with pytest.raises(FileNotFoundError, match=r"path='.*' cannot be written"):
        write_report(report, images, tmp_path / "no folder" / "page.html")


def test_names_are_text(tmp_path):
    images = squares(3)
    write_report(report_of(images), images, tmp_path / "page.html", names=BAD_NAMES)
    page = Page(tmp_path / "page.html")
    assert sorted(text for _, text in page.find("bdi")) == sorted(BAD_NAMES)
    assert len(page.find("script")) == 1
    assert not page.find("img")


@pytest.mark.skipif(os.name != "posix", reason="such names are for POSIX systems")
def test_names_of_files_are_text(tmp_path):
    images = squares(2)
    names = ["<script>'\"&.png", os.fsdecode(b"\xff.png")]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    paths = [tmp_path / name for name in names]
    write_report(report_of(images), paths, tmp_path / "page.html")
    found = [text for _, text in Page(tmp_path / "page.html").find("bdi")]
    assert found == [names[0], "\\udcff.png"]


def test_the_page_is_in_the_package():
    package = Path(skanomaly.__file__).parent
    config = configparser.ConfigParser()
    config.read(package.parent / "setup.cfg")
    listed = set(config["options.package_data"]["skanomaly"].split())
    assert listed == {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Return Chromium, or skip."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright, to open pages in a browser"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(names)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return an open page of six images, and what it has asked for."""
    images = squares()
    names = [*BAD_NAMES, "part 10", "part 9", "part 2"]
    write_report(report_of(images), images, tmp_path / "page.html", names=names)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    yield page, asked
    page.close()


def shown(page):
    """Return the names of the rows that are shown, from top to bottom."""
    return page.locator("tbody:not([hidden]) bdi").all_text_contents()


def test_the_table_sorts_in_a_browser(opened):
    page, _ = opened
    first = shown(page)
    header = page.get_by_role("columnheader", name="Name")
    header.get_by_role("button").click()
    assert shown(page)[-3:] == ["part 2", "part 9", "part 10"]
    assert header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").press("Enter")
    assert shown(page)[:3] == ["part 10", "part 9", "part 2"]
    assert header.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Score").click()
    assert shown(page)[:3] == first[:3]  # the others have equal scores
    assert page.locator("[aria-sort]").all_text_contents() == ["Score"]


def test_the_table_filters_in_a_browser(opened):
    page, _ = opened
    page.get_by_label("Show").select_option("anomalous")
    assert len(shown(page)) == 3
    page.get_by_label("Name contains").fill("PART")
    assert shown(page) == ["part 9"]
    assert page.locator("output").text_content() == "1 of 6 images"
    page.get_by_label("Show").select_option("")
    assert sorted(shown(page)) == ["part 10", "part 2", "part 9"]


def test_a_row_opens_in_a_browser(opened):
    page, _ = opened
    button = page.get_by_role("button", name="part 9")
    figures = page.locator("#of-4 svg")
    assert button.get_attribute("aria-expanded") == "false"
    assert not figures.first.is_visible()
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    # the bright square, as image 4 has it
    drawn = np.asarray(Image.open(io.BytesIO(figures.first.screenshot())))
    height, width = drawn.shape[:2]
    inside = drawn[int(14 / 32 * height), int(9 / 32 * width), :3]
    outside = drawn[int(28 / 32 * height), int(28 / 32 * width), :3]
    np.testing.assert_allclose(inside, 220, atol=8)
    np.testing.assert_allclose(outside, 60, atol=8)
    # and the same, in colours, with an outline
    assert figures.count() == 3
    drawn = np.asarray(Image.open(io.BytesIO(figures.nth(2).screenshot())))[..., :3]
    green = (drawn == [0, 255, 0]).all(axis=-1)
    rows, columns = np.nonzero(green)
    assert abs(rows.min() / height - 8 / 32) < 0.03
    assert abs(columns.max() / width - 14 / 32) < 0.03
    button.click()
    assert not figures.first.is_visible()


def test_a_page_asks_for_nothing_and_runs_nothing_of_names(opened):
    page, asked = opened
    page.locator("tbody button").first.click()
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("window.ran") is None
    # a script that slipped in would not run
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None
    others = [url for url in asked if not re.match("file:.*page.html$|data:", url)]
    assert not others


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_telephone(opened, scheme):
    page, _ = opened
    page.emulate_media(color_scheme=scheme)
    page.locator("tbody button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    text, back = (
        np.mean(
            list(
                map(
                    int,
                    re.findall(
                        r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}")
                    ),
                )
            )[:3]
        )
        for name in ("color", "backgroundColor")
    )
    assert (text > 200 > 60 > back) if scheme == "dark" else (back > 200 > 60 > text)


def test_without_scripts_all_pictures_are_shown(browser, tmp_path):
    images = squares(3)
    write_report(report_of(images), images, tmp_path / "page.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert all(figure.is_visible() for figure in page.locator("tbody svg").all())
    context.close()
