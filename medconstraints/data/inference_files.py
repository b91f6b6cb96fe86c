"""Which volumes an inference run reads, what it calls their masks, and that nothing it would write is lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medconstraints import checks
from medconstraints.data.datalist_sections import read_datalist
from medconstraints.data.output_folders import check_output_dir, mask_path
from medconstraints.volumes.dicom import is_dicom_volume
from medconstraints.volumes.dicom_seg import dicom_seg_path
from medconstraints.volumes.facts import facts_path, read_facts
from medconstraints.volumes.files import VOLUME_ENDINGS, find_volumes, is_volume, volume_stem
from medconstraints.volumes.masks import probabilities_path

logger = logging.getLogger(__name__)

__all__ = ["INFERENCE_REPORT", "RESULTS", "volumes_for_inference"]

INFERENCE_REPORT = "inference.json"
REPORTS = (INFERENCE_REPORT, "volumes.csv", "index.html", "index_pages", "settings.json")
# What may stand there for a volume, by the name of its mask.
RESULTS: tuple[Callable[[Path], Path], ...] = (Path, facts_path, probabilities_path, dicom_seg_path)
LONGEST_NAME = 255  # bytes, of most file systems


def volumes_for_inference(
    source: str | Path,
    *,
    section: str = "test",
    output_dir: str | Path | None = None,
    postfix: str = "seg",
    overwrite: bool = False,
    resume: bool = False,
    probabilities: bool = False,
    dicom_seg: bool = False,
    made_by: str = "",
) -> list[dict[str, Any]]:
    """Items for every file of a folder, an entry of a datalist, or one file; `TolerantDataset` takes them.

    Keys: "image", its path, or a list of paths, one for each channel, of which the first names the mask; "name", by
    which reports call it; "mask", the mask's path from the output folder. An item that is not segmented has a reason
    instead: "refused" for a volume that cannot be, "left_out" for a file that is none, "kept" for one whose mask is
    there already.

    Args:
        source: a folder with all that is below it (a folder of DICOM slices is one volume), a datalist in the style of
            the Medical Segmentation Decathlon (paths relative to it), or one volume.
        section: section of the datalist.
        output_dir: where the masks will be written, in the folders that the volumes have below the source; it is
            checked as `check_output_dir` does. None skips the check.
        postfix: see `mask_path`.
        overwrite: accept masks that exist already. They stay until the new ones are written.
        resume: keep masks that exist already, and segment the others.
        probabilities: those of the classes will be written too.
        dicom_seg: DICOM Segmentations will be written too.
        made_by: of `run_fingerprint`, which masks that are kept must have too.

    Raises:
        FileNotFoundError: the source does not exist or holds no volume.
        ValueError: the datalist cannot be used (see `read_datalist`) or lists another kind of file, masks would be
            written into the folder of the volumes or over one of them, or both `overwrite` and `resume`.
        FileExistsError: a mask or a report is there already, with neither of the two, or is of another run.
        PermissionError: the output folder cannot be written to.
    """
    if checks.flag("overwrite", overwrite) and checks.flag("resume", resume):
        raise ValueError("overwrite, resume: expected one of them at most; resume keeps the masks that are there.")
    source, output = Path(source), None if output_dir is None else Path(output_dir)
    items = _listed(source, section, output)
    if not any("left_out" not in item for item in items):
        raise FileNotFoundError(f"source: no volume in {source}; it holds {len(items)} other files.")
    _name_masks(items, postfix)
    wanted = [item for item in items if "mask" in item and "refused" not in item]
    if output is not None:
        _check_apart(source, wanted, output)
        images = [Path(item["image"] if isinstance(item["image"], str) else item["image"][0]) for item in wanted]
        if dicom_seg and (others := [image.name for image in images if not is_dicom_volume(image)]):
            told = "dicom_seg: %d of %d volumes, such as %s, are no DICOM, and get no DICOM Segmentation"
            logger.warning(told, len(others), len(images), others[0])
        asked = (True, True, checks.flag("probabilities", probabilities), checks.flag("dicom_seg", dicom_seg))
        written = [result for result, wish in zip(RESULTS, asked, strict=True) if wish]
        names = [result(Path(item["mask"])).as_posix() for result in written for item in wanted]
        check_output_dir(output, [*names, *REPORTS], overwrite=overwrite or resume)
        if resume:
            _keep(wanted, output, made_by)
    return items


def _keep(items: list[dict[str, Any]], output: Path, made_by: str) -> None:
    """What is there and whole stays, if it was made as it would be made now."""
    kept = [item for item in items if (output / item["mask"]).exists() and facts_path(output / item["mask"]).is_file()]
    for item in kept:
        item["kept"] = "has a mask already"
    told = {item["mask"]: read_facts(output / item["mask"]).get("made_by", "") for item in kept}
    if other := [mask for mask, by in told.items() if by != made_by]:
        raise FileExistsError(
            f"output_dir: {len(other)} of {len(kept)} masks that are there, such as {other[0]}, were made with other "
            "weights or settings; set these back, choose another folder, or set overwrite in place of resume."
        )


def _listed(source: Path, section: str, output: Path | None) -> list[dict[str, Any]]:
    """Items without the names of their masks."""
    if source.is_dir():
        items: list[dict[str, Any]] = []
        within = output is not None and source.resolve() in output.resolve().parents
        for path, reason in find_volumes(source):
            if within and Path(os.path.realpath(path)).is_relative_to(output.resolve()):  # type: ignore[union-attr]
                continue  # results of a former run
            name = path.relative_to(source).as_posix() if path != source else source.resolve().name
            items.append({"image": str(path), "name": name, **({"left_out": reason} if reason else {})})
        return items
    if source.suffix == ".json" and source.is_file():
        entries = read_datalist(source, section)
        channels = [_paths(entry["image"], number, source) for number, entry in enumerate(entries)]
        folders = [Path(os.path.abspath(paths[0])).parent for paths in channels]
        names = [Path(paths[0]).name for paths in channels]
        if len({volume_stem(name) for name in names}) < len(names):  # they keep their folders
            shared = Path(os.path.commonpath(folders))
            names = [
                (folder.relative_to(shared) / name).as_posix() for folder, name in zip(folders, names, strict=True)
            ]
        return [
            {"image": paths if len(paths) > 1 else paths[0], "name": name}
            for paths, name in zip(channels, names, strict=True)
        ]
    if is_volume(source) and source.is_file():
        return [{"image": str(source), "name": source.name}]
    raise FileNotFoundError(
        f"source: expected a folder, a datalist (.json) or a volume ({', '.join(VOLUME_ENDINGS)}), got {source}, which "
        f"{'is none of them' if source.exists() else 'does not exist'}."
    )


def _paths(image: Any, number: int, source: Path) -> list[str]:
    paths = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    # What has no ending may be a folder of slices; whether it is there is found out when it is read.
    if paths and all(isinstance(path, str) and (is_volume(Path(path)) or not Path(path).suffix) for path in paths):
        return paths
    raise ValueError(
        f"source: entry {number} of {source.name}: expected one volume ({', '.join(VOLUME_ENDINGS)}) or DICOM folder "
        f"for each volume or channel, got {image!r}; convert other formats first."
    )


def _name_masks(items: list[dict[str, Any]], postfix: str) -> None:
    """The mask of each volume; volumes whose results could not be told apart, or have no name, are refused."""
    volumes = [item for item in items if "left_out" not in item]
    users: dict[Path, list[str]] = {}
    for item in volumes:
        item["mask"] = mask_path(Path(item["name"]).parent, item["name"], postfix=postfix).as_posix()
        for result in RESULTS:
            users.setdefault(result(Path(item["mask"])), []).append(item["name"])
    for item in volumes:
        files = [result(Path(item["mask"])) for result in RESULTS]
        shared = next((file for file in files if len(users[file]) > 1), None)
        if shared is not None:
            item["refused"] = f"{' and '.join(users[shared])} would have one file, {shared}; rename one of them"
        elif max(len(os.fsencode(file.name)) for file in files) > LONGEST_NAME:
            item["refused"] = f"the names of its results are longer than {LONGEST_NAME} bytes; give it a shorter one"


def _check_apart(source: Path, items: list[dict[str, Any]], output_dir: Path) -> None:
    """Results must not land among the inputs: the next run would take them for volumes, or they replace a volume."""
    folder = output_dir.resolve()
    if source.is_dir() and folder == source.resolve():
        raise ValueError(
            f"output_dir: {output_dir} is the folder of the volumes, the masks would be taken for volumes; choose "
            "another folder."
        )
    # realpath follows links to the files that would be lost, and does not raise on one that leads to itself.
    inputs = {
        os.path.realpath(path)
        for item in items
        for path in (item["image"] if isinstance(item["image"], list) else [item["image"]])
    }
    names = [result(Path(item["mask"])).as_posix() for result in RESULTS for item in items]
    lost = [name for name in names if os.path.realpath(folder / name) in inputs]
    if lost:
        raise ValueError(
            f"output_dir: the file {lost[0]} would replace a volume of that name in {output_dir}; choose another "
            "folder."
        )
