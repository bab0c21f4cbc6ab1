from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_class_folders
from PIL import Image

from utils.data import phantom
from utils.data.classes import CLASSES, canonical_class, healthy_class
from utils.data.sources import load_source


def test_class_order_is_by_severity_however_folders_are_called(tmp_path: Path) -> None:
    names = ("Moderate Impairment", "No Impairment", "VeryMildDemented", "mild_demented")
    raw = load_source(write_class_folders(tmp_path / "d", names))
    assert raw.classes == CLASSES == ("Non", "VeryMild", "Mild", "Moderate")
    for path, label in zip(raw.paths, raw.labels):
        assert raw.classes[label] == canonical_class(path.split("/")[0])


def test_unknown_classes_are_sorted(tmp_path: Path) -> None:
    assert load_source(write_class_folders(tmp_path / "d", ("pear", "apple"))).classes == ("apple", "pear")


def _archive(folder: Path, target: Path) -> Path:
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as opened:
            for file in folder.rglob("*.png"):
                opened.write(file, Path("top") / file.relative_to(folder))
    else:
        with tarfile.open(target, "w:xz" if target.suffix == ".xz" else "w") as opened:
            opened.add(folder, "top")
    return target


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.xz"])
def test_archives_give_the_same_images_as_their_folder(class_folders: Path, tmp_path: Path, name: str) -> None:
    packed, plain = load_source(_archive(class_folders, tmp_path / name)), load_source(class_folders)
    assert np.array_equal(packed.pixels, plain.pixels) and np.array_equal(packed.labels, plain.labels)


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_class_folders(tmp_path / "d" / split)
    raw = load_source(tmp_path / "d")
    assert raw.folders == [path.split("/")[0] for path in raw.paths] and len(raw) == 12


def test_any_size_colour_and_format(class_folders: Path) -> None:
    Image.new("RGB", (50, 30), (200, 200, 200)).save(class_folders / "Mild_Demented" / "big.jpg")
    Image.fromarray(np.full((24, 24), 40000, np.uint16)).save(class_folders / "Mild_Demented" / "deep.png")
    raw = load_source(class_folders)
    assert raw.pixels.shape == (8, 24, 24) and raw.pixels.dtype == np.uint8 and "sizes" in raw.notes[0]
    deep = raw.pixels[raw.paths.index("Mild_Demented/deep.png")]
    assert (deep == 40000 >> 8).all()
    assert load_source(class_folders, size=32).pixels.shape == (8, 32, 32)


def test_system_files_are_ignored(class_folders: Path) -> None:
    (class_folders / "Mild_Demented" / ".DS_Store").write_bytes(b"x")
    (class_folders / "Mild_Demented" / "Thumbs.db").write_bytes(b"x")
    assert len(load_source(class_folders)) == 6


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_source(tmp_path / "nowhere")


def test_kaggle_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import kagglehub

    def refuse(handle: str) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(kagglehub, "dataset_download", refuse)
    with pytest.raises(FileNotFoundError, match="lukechugh/best-alzheimer-mri-dataset-99-accuracy in a browser"):
        load_source("kaggle")


def test_kaggle_handle_is_downloaded(monkeypatch: pytest.MonkeyPatch, class_folders: Path) -> None:
    import kagglehub

    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: str(class_folders) if handle == "a/b" else "")
    assert len(load_source("a/b")) == 6


def test_no_class_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class folders"):
        load_source(tmp_path)


def test_empty_class(class_folders: Path) -> None:
    (class_folders / "Moderate_Demented").mkdir()
    with pytest.raises(ValueError, match="without images.*Moderate_Demented"):
        load_source(class_folders)


def test_one_class_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one class only"):
        load_source(write_class_folders(tmp_path / "d", ("Non_Demented",)))


@pytest.mark.parametrize("name", ["notes.txt", "broken.png", "cut.jpg"])
def test_unreadable_files_are_named(class_folders: Path, name: str) -> None:
    path = class_folders / "Non_Demented" / name
    if name == "cut.jpg":
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(stream, "JPEG")
        path.write_bytes(stream.getvalue()[:900])
    else:
        path.write_text("no image")
    with pytest.raises(ValueError, match=f"1 of 7 files.*Non_Demented/{name}"):
        load_source(class_folders)


@pytest.mark.parametrize("member", ["../evil.png", "/evil.png", "top/../../evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_members_may_not_escape(tmp_path: Path, member: str, kind: str) -> None:
    target = tmp_path / f"bad.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as opened:
            opened.writestr(member, b"x")
    else:
        with tarfile.open(target, "w") as opened:
            opened.addfile(tarfile.TarInfo(member), io.BytesIO())
    with pytest.raises(ValueError, match="not safe to unpack"):
        load_source(target)
    assert not list(tmp_path.parent.glob("evil.png"))


def test_archive_links_may_not_escape(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as opened:
        link = tarfile.TarInfo("top/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        opened.addfile(link)
    with pytest.raises(ValueError, match="not safe to unpack"):
        load_source(tmp_path / "bad.tar")


@pytest.mark.parametrize("name", ["bad.zip", "bad.tar.xz", "bad.rar"])
def test_damaged_and_unknown_archives(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=name):
        load_source(tmp_path / name)


def test_a_damaged_tar_is_never_taken_for_a_smaller_one(class_folders: Path, tmp_path: Path) -> None:
    content = bytearray(_archive(class_folders, tmp_path / "whole.tar").read_bytes())
    with tarfile.open(tmp_path / "whole.tar") as opened:
        headers = [member.offset for member in opened.getmembers()]
    broken, cut = content.copy(), content[: headers[-1]]
    broken[headers[-2] + 10] ^= 0xFF
    for damaged in (broken, cut):
        (tmp_path / "damaged.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.tar could not be unpacked"):
            load_source(tmp_path / "damaged.tar")


@pytest.mark.parametrize("name", ["whole.zip", "whole.tar.xz"])
def test_flipped_bits_end_in_one_clear_error(class_folders: Path, tmp_path: Path, name: str) -> None:
    content = bytearray(_archive(class_folders, tmp_path / name).read_bytes())
    for place in range(len(content) // 3, len(content) - 1, len(content) // 7):
        damaged = content.copy()
        damaged[place] ^= 0x55
        (tmp_path / f"d_{name}").write_bytes(damaged)
        try:
            assert len(load_source(tmp_path / f"d_{name}")) == 6
        except ValueError as error:
            assert f"d_{name}" in str(error)


def test_zip_names_with_backslashes(class_folders: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as opened:
        for file in class_folders.rglob("*.png"):
            opened.writestr(f"top\\{file.parent.name}\\{file.name}", file.read_bytes())
    assert len(load_source(tmp_path / "w.zip")) == 6


def test_errors_name_the_archive_and_not_where_it_was_unpacked(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "d", ("Non",))
    with pytest.raises(ValueError, match=r"one\.tar holds one class"):
        load_source(_archive(tmp_path / "d", tmp_path / "one.tar"))


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "val", "test"), ("TRAIN", "Test")])
def test_other_names_of_split_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_class_folders(tmp_path / "d" / name)
    raw = load_source(tmp_path / "d")
    kept_apart = {"train", "validation", "test"} if "val" in names else {"train", "test"}
    assert raw.classes == ("Non", "Mild") and set(raw.folders) == kept_apart
    assert raw.folders.count("test") == raw.folders.count("train") == 6 and not raw.notes


def test_misleading_layouts_are_refused(tmp_path: Path) -> None:
    for name in ("train", "Train", "test"):
        write_class_folders(tmp_path / "twice" / name)
    with pytest.raises(ValueError, match="there are also"):
        load_source(tmp_path / "twice")
    write_class_folders(tmp_path / "differ" / "train", ("AD", "CN"))
    write_class_folders(tmp_path / "differ" / "test", ("AD", "CN_new"))
    with pytest.raises(ValueError, match="different classes"):
        load_source(tmp_path / "differ")
    write_class_folders(tmp_path / "deep" / "Data")
    write_class_folders(tmp_path / "deep", ("preview",))
    with pytest.raises(ValueError, match="Data should be a class folder but holds class folders"):
        load_source(tmp_path / "deep")


def test_loose_images_are_noted_and_patient_folders_are_read(class_folders: Path) -> None:
    patient = class_folders / "Mild_Demented" / "patient_7"
    patient.mkdir()
    (patient / "s.PNG").write_bytes((class_folders / "Mild_Demented" / "0.png").read_bytes())
    (class_folders / "loose.png").write_bytes((class_folders / "Mild_Demented" / "0.png").read_bytes())
    raw = load_source(class_folders)
    assert "Mild_Demented/patient_7/s.PNG" in raw.paths and len(raw) == 7 and "loose.png" in raw.notes[0]


def test_links_are_followed_once_and_broken_ones_refused(class_folders: Path, tmp_path: Path) -> None:
    outside = write_class_folders(tmp_path / "outside", ("more",), seed=1) / "more"
    (class_folders / "Mild_Demented" / "linked").symlink_to(outside)
    (class_folders / "Mild_Demented" / "loop").symlink_to(class_folders / "Mild_Demented")
    assert len(load_source(class_folders)) == 9
    (class_folders / "Mild_Demented" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        load_source(class_folders)


@pytest.mark.parametrize("size", [-5, 0, 10_000_000])
@pytest.mark.parametrize("source", ["phantom", "folder"])
def test_bad_sizes(class_folders: Path, source: str, size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        load_source(class_folders if source == "folder" else source, size=size)


def test_empty_and_mistyped_sources(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(class_folders.parent)
    for source in ("", "images/nothing"):
        with pytest.raises(FileNotFoundError, match="neither a folder"):
            load_source(source)


def test_names_that_no_table_can_hold(class_folders: Path) -> None:
    (class_folders / "Mild_Demented" / "0.png").rename(class_folders / "Mild_Demented" / "a\rb.png")
    with pytest.raises(ValueError, match="rename it"):
        load_source(class_folders)


def _move(folder: Path, old: str, new: str) -> None:
    (folder / new).parent.mkdir(parents=True, exist_ok=True)
    (folder / old).rename(folder / new)


def _files_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no picture")
    return root


@pytest.mark.parametrize("names", [("train-split", "valid-split"), ("part one", "part two"), ("fold1", "fold2"), "ab"])
@pytest.mark.parametrize("classes", [("CN", "AD", "MCI"), ("0_Non", "1_Mild"), ("CDR0", "CDR1"), ("pear", "apple")])
def test_a_folder_one_level_too_high(tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    for seed, name in enumerate(names):
        write_class_folders(tmp_path / "top" / name, classes, seed=seed)
    with pytest.raises(ValueError, match=f"{names[0]}, {names[1]} would be the classes, but they hold the same"):
        load_source(tmp_path / "top")
    assert load_source(tmp_path / "top" / names[0]).classes


def test_folders_called_like_splits_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test-images would be a class, but is called like a split"):
        load_source(write_class_folders(tmp_path, ("AD", "test-images")))
    with pytest.raises(ValueError, match="same folders"):
        for seed, name in enumerate(("val", "test")):
            write_class_folders(tmp_path / "d" / name, ("AD", "CN"), seed=seed)
        load_source(tmp_path / "d")


def test_patient_folders_are_read_even_of_a_patient_who_converted(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("AD/003_S_0295", "AD/AD_7", "MCI/003_S_0295", "MCI/021_S_0007/axial"))
    raw = load_source(tmp_path)
    assert raw.classes == ("MCI", "AD") and len(raw) == 12
    assert raw.paths[0] == "AD/003_S_0295/0.png" and raw.paths[-1] == "MCI/021_S_0007/axial/2.png"


def test_one_folder_of_images_in_each_class_is_no_class(tmp_path: Path) -> None:
    assert load_source(write_class_folders(tmp_path, ("AD/images", "CN/images"))).classes == ("CN", "AD")


def test_the_published_validation_folder_is_kept(tmp_path: Path) -> None:
    for seed, name in enumerate(("Train", "valid", "Test")):
        write_class_folders(tmp_path / "d" / name, seed=seed)
    raw = load_source(tmp_path / "d")
    expected = {"Train": "train", "valid": "validation", "Test": "test"}
    assert raw.folders == [expected[path.split("/")[0]] for path in raw.paths] and not raw.notes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["CN/a.mnc", "AD/b.nrrd"], "2 MINC or NRRD volumes, such as AD/b.nrrd"),
        (["a/x.gif", "b/y.jp2"], "2 images in another format"),
        (["train.zip", "test.zip"], "2 archives inside"),
        (["slices.npz"], "1 arrays"),
    ],
)
def test_what_is_not_read_is_named_with_what_to_do(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_source(_files_of(tmp_path / "d", *names))
    assert "one folder a class" in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "table"),
    [
        (["images"], "labels.csv"),
        (["train", "test"], "train.csv"),
        (["images/a"], "meta/labels.json"),
        (["images", "masks"], None),
        (["train/images", "train/labels", "test/images", "test/labels"], None),
        (["."], "list.xlsx"),
    ],
)
def test_images_without_class_folders_are_told_what_to_do(
    tmp_path: Path, folders: list[str], table: str | None
) -> None:
    write_class_folders(tmp_path / "d", tuple(folders))
    if table:
        _files_of(tmp_path / "d", table)
    with pytest.raises(ValueError, match="no class folders. Sort the images into one folder a class") as caught:
        load_source(tmp_path / "d")
    assert (table or "images/") in str(caught.value) and "--subjects" in str(caught.value)


def test_patients_taken_for_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="30 folders, such as 000_S_1: too many for classes"):
        load_source(write_class_folders(tmp_path, tuple(f"{number:03d}_S_1" for number in range(30))))


def test_other_files_in_class_folders_are_named(class_folders: Path) -> None:
    _files_of(class_folders, "Mild_Demented/labels.csv", "Mild_Demented/README.txt", "Non_Demented/scan.nii")
    with pytest.raises(ValueError, match=r"3 of 9 files.*labels\.csv.*scan\.nii"):
        load_source(class_folders)


def test_hidden_and_passed_over_files_are_counted(class_folders: Path) -> None:
    _files_of(class_folders, "__MACOSX/._0.png", ".git/config", "Mild_Demented/.DS_Store", "Thumbs.db")
    assert load_source(class_folders).info == {"ignored_files": 4} and not load_source(class_folders).notes
    _files_of(class_folders, "_old/0.png")
    _move(class_folders, "Mild_Demented/0.png", "Mild_Demented/_0.png")
    raw = load_source(class_folders)
    assert raw.info == {"ignored_files": 5} and "_old/0.png" in raw.notes[0] and "Mild_Demented/_0.png" in raw.paths


def test_images_in_a_hidden_class_folder_are_not_left_out_unsaid(class_folders: Path) -> None:
    _files_of(class_folders, ".Moderate_Demented/0.png")
    assert ".Moderate_Demented/0.png" in load_source(class_folders).notes[0]


def _copy(root: Path, old: str, new: str) -> None:
    (root / new).write_bytes((root / old).read_bytes())


def test_a_picture_in_two_classes_is_left_out_of_both_and_named(tmp_path: Path) -> None:
    for seed in range(8):
        write_class_folders(tmp_path, ("CN", "AD"), prefix=f"{seed}_", seed=seed)
    _copy(tmp_path, "AD/0_1.png", "CN/zz.png")
    _copy(tmp_path, "AD/0_0.png", "AD/copy.png")
    raw = load_source(tmp_path)
    assert "AD/0_1.png" not in raw.paths and "CN/zz.png" not in raw.paths and "AD/copy.png" in raw.paths
    assert len(raw) == len(raw.pixels) == len(raw.labels) == len(raw.folders) == 48 + 2 - 2
    assert all(raw.classes[label] == path.split("/")[0] for path, label in zip(raw.paths, raw.labels))
    assert raw.info == {"conflicting_images": 2} and "AD/0_1.png and CN/zz.png" in raw.notes[0]
    kept = Image.open(tmp_path / raw.paths[20])
    assert np.array_equal(raw.pixels[20], np.asarray(kept))


def test_many_pictures_in_two_classes_stop(tmp_path: Path) -> None:
    for seed in range(2):
        write_class_folders(tmp_path, ("CN", "AD"), prefix=f"{seed}_", seed=seed)
    # the same pixels in another kind of file
    Image.open(tmp_path / "AD" / "0_1.png").convert("RGBA").save(tmp_path / "CN" / "zz.png", compress_level=0)
    with pytest.raises(ValueError, match=r"2 of 13 images are the same.*AD/0_1\.png and CN/zz\.png.*remove the wrong"):
        load_source(tmp_path)


def test_the_same_picture_in_train_and_test_of_two_classes_is_found_too(tmp_path: Path) -> None:
    for split, seeds in (("train", range(10)), ("test", range(10, 14))):
        for seed in seeds:
            write_class_folders(tmp_path / split, ("CN", "AD"), prefix=f"{seed}_", seed=seed)
    _copy(tmp_path, "train/AD/3_1.png", "test/CN/11_1.png")
    _copy(tmp_path, "train/AD/4_1.png", "test/AD/11_1.png")
    raw = load_source(tmp_path)
    assert raw.info == {"conflicting_images": 2} and {"train/AD/4_1.png", "test/AD/11_1.png"} <= set(raw.paths)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("MCI", "AD", "CN"), ("CN", "MCI", "AD")),
        (("AD", "LMCI", "NC", "EMCI", "SMC", "MCI"), ("NC", "SMC", "EMCI", "MCI", "LMCI", "AD")),
        (("Demented", "Non Demented"), ("Non", "Demented")),
        (("Alzheimer's Disease", "Normal"), ("Normal", "Alzheimer's Disease")),
        (("Mild Cognitive Impairment", "Cognitively Normal"), ("Cognitively Normal", "Mild Cognitive Impairment")),
        (("Very mild Dementia", "Moderate Dementia", "Mild Dementia", "Non Demented"), CLASSES),
        (("No Dementia", "Severe", "Mild"), ("Non", "Mild", "Severe")),
        (("Demented", "Converted", "Nondemented"), ("Non", "Converted", "Demented")),
        (("CN", "AD", "other"), ("AD", "CN", "other")),
        (("1", "10", "2"), ("1", "2", "10")),
        (("stage 3", "stage 12", "stage 1"), ("stage 1", "stage 3", "stage 12")),
    ],
)
def test_classes_of_any_set_keep_their_names_and_follow_severity(
    tmp_path: Path, names: tuple[str, ...], order: tuple[str, ...]
) -> None:
    assert load_source(write_class_folders(tmp_path, names)).classes == order


@pytest.mark.parametrize(
    ("classes", "healthy"),
    [
        (CLASSES, "Non"),
        (("AD", "CN", "MCI"), "CN"),
        (("NC", "AD"), "NC"),
        (("Normal", "Mild"), "Normal"),
        (("Controls", "Dementia"), "Controls"),
        (("No Dementia", "AD"), "No Dementia"),
        (("Cognitively Normal", "AD"), "Cognitively Normal"),
        (("NoAlzheimer", "Alzheimer"), "NoAlzheimer"),
        (("Undemented", "Demented"), "Undemented"),
        (("No Cognitive Impairment", "MCI"), "No Cognitive Impairment"),
        (("cognitively_unimpaired", "AD"), "cognitively_unimpaired"),
        (("NCI", "MCI"), "NCI"),
        (("No Alzheimer's Disease", "AD"), "No Alzheimer's Disease"),
        (("Non-Alzheimer dementia", "AD"), None),
        (("nonAD_Dementia", "AD_Dementia"), None),
        (("Non-Alzheimer's disease type dementia", "CN"), "CN"),
        (("MCI", "AD"), None),
        (("VeryMild", "Mild"), None),
        (("apple", "pear"), None),
        (("CN", "Normal"), None),
        ((), None),
    ],
)
def test_the_class_that_means_no_dementia(classes: tuple[str, ...], healthy: str | None) -> None:
    assert healthy_class(classes) == healthy


def test_an_order_of_ones_choice(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, ("CN", "MCI", "AD"))
    raw = load_source(folder, classes=("AD", "CN", "MCI"))
    assert raw.classes == ("AD", "CN", "MCI")
    assert all(raw.classes[label] == path.split("/")[0] for path, label in zip(raw.paths, raw.labels))
    for wrong in (("AD", "CN"), ("AD", "CN", "MCI", "SMC"), ("AD", "CN", "CN"), ("AD", "CN", "LMCI")):
        with pytest.raises(ValueError, match="classes must be CN, MCI, AD in an order of your choice"):
            load_source(folder, classes=wrong)


def test_an_order_by_names_of_folders_or_of_phantoms(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load_source(class_folders, classes=("Mild_Demented", "Non_Demented"))
    assert raw.classes == ("Mild", "Non") and raw.labels.tolist() == [0, 0, 0, 1, 1, 1]
    few = phantom.make_phantoms(phantom.PhantomConfig(n_subjects=8, n_levels=1))
    monkeypatch.setattr(phantom, "make_phantoms", lambda *_, size: few)
    turned, plain = load_source("phantom", classes=CLASSES[::-1]), load_source("phantom")
    assert turned.classes == CLASSES[::-1] and np.array_equal(turned.labels, 3 - plain.labels)
