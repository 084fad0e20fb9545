"""Folders of images as classes, as `hf-dbp inspect` reports them."""

from hf_dbp.inspection.choices import Findings
from hf_dbp.inspection.class_folders import describe_class_folders


def samples(**counts):
    return {f"{name}/{number}": (f"{name}/{number}.png",) for name, count in counts.items() for number in range(count)}


def test_even_folders_are_a_line_and_a_command():
    found = Findings()
    command = describe_class_folders({"train": samples(cat=4, dog=5)}, "my images", found)
    assert found.lines == [
        "folders    2, with 4 (cat) to 5 images (dog): if each is a class, they are labels for hf-dbp classify"
    ]
    assert found.problems == []
    assert command.startswith("hf-dbp classify 'my images' --model_name_or_path ") and "balanced" not in command


def test_what_a_classifier_suffers_from():
    found = Findings()
    command = describe_class_folders({"train": samples(cat=10, dog=1)}, "images", found)
    assert command.endswith(" --balanced_sampling")
    assert [problem.split(":")[0].split(",")[0] for problem in found.problems] == [
        "as classes the folders are uneven", "as classes 1 folders have one image",
    ]  # fmt: skip
    found = Findings()
    describe_class_folders({"train": samples(cat=2, dog=2), "validation": samples(dog=1, owl=1)}, "images", found)
    assert found.problems == ["as classes 1 folders of validation are not in train, e.g. owl"]


def test_images_without_folders_are_no_classes():
    for images in ({"train": samples(cat=3)}, {"train": samples(cat=3, dog=3) | {"stray": ("stray.png",)}}):
        found = Findings()
        assert describe_class_folders(images, "images", found) is None
        assert found == Findings()
    assert describe_class_folders({"train": samples(cat=3, dog=3)}, None, Findings()) is None
