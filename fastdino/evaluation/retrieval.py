"""Landmark retrieval: revisited Oxford and Paris (DINO paper, table 3; Radenovic et al., arXiv 1803.11285).

Every database image is ranked by the cosine of its [CLS] feature with that of the query. *Easy* counts easy
positives and ignores hard ones, *medium* counts both, *hard* counts hard positives and ignores easy ones;
junk is ignored always. As in the official script queries are whole images, although the benchmark asks for
their boxes; ``crop_queries`` follows the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor, nn

from fastdino.evaluation.features import ImagePath, read_image
from fastdino.evaluation.ground_truth import GroundTruth, Query, read_ground_truth
from fastdino.evaluation.ranking import RankingScores, score

LAYOUT = """\
DIR/
  {name}/
    gnd_{name}.pkl       ground truth of github.com/filipradenovic/revisitop
    jpg/
      *.jpg              all images named there"""

_SCALES = (2**-0.5, 0.5)  # besides the image itself


def benchmark(data_path: Path, name: str) -> tuple[GroundTruth, list[Path], list[Path]]:
    """Ground truth of ``data_path/name``, files of the database, files of the queries.

    Raises FileNotFoundError, with the expected layout, if anything is missing.
    """
    folder = data_path / name
    try:
        truth = read_ground_truth(folder / f"gnd_{name}.pkl")
        return truth, *image_files(truth, folder / "jpg")
    except FileNotFoundError as error:
        layout = LAYOUT.format(name=name)
        raise FileNotFoundError(f"--data_path {data_path}: {error}; expected\n{layout}") from None


def image_files(truth: GroundTruth, folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of the database and of the queries: ``folder/name``, or ``folder/name.jpg`` if there is none.

    Raises FileNotFoundError that counts the missing ones.
    """

    def file_of(name: str) -> Path:
        return folder / name if Path(name).suffix and (folder / name).is_file() else folder / f"{name}.jpg"

    files = [file_of(name) for name in (*truth.images, *(query.name for query in truth.queries))]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} images are missing, first {missing[0]}")
    return files[: len(truth.images)], files[len(truth.images) :]


def load_image(path: ImagePath, size: int, box: Sequence[float] | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of an image, or of a ``box`` of it, shrunk (Lanczos) so that no side exceeds ``size``.

    Smaller images keep their size.
    """
    image = read_image(path)
    if box is not None:
        image = image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.array(image)


@contextmanager
def truncated_images() -> Iterator[None]:
    """Damaged JPEGs are read as far as they go: a benchmark names its images, so none can be left out."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def describer(backbone: nn.Module, multiscale: bool) -> Callable[[Tensor], Tensor]:
    """The backbone, or with ``multiscale`` the mean of its features at scales 1, 1/sqrt(2) and 1/2.

    Images are scaled bilinearly after normalisation; features are averaged as they are, not normalised.
    """
    if not multiscale:
        return backbone

    def describe(images: Tensor) -> Tensor:
        features = backbone(images)
        for scale in _SCALES:
            smaller = nn.functional.interpolate(
                images, scale_factor=scale, mode="bilinear", align_corners=False
            )
            features = features + backbone(smaller)
        return features / (1 + len(_SCALES))

    return describe


def retrieval_scores(order: np.ndarray, queries: Sequence[Query]) -> dict[str, RankingScores]:
    """Scores of rankings ``order`` int [Q, N]: easy, medium, hard, as far as any query has such a positive.

    Raises ValueError if no query has any.
    """
    nothing = np.empty(0, np.int64)
    settings = {
        "easy": [(query.easy, query.hard) for query in queries],
        "medium": [(np.concatenate([query.easy, query.hard]), nothing) for query in queries],
        "hard": [(query.hard, query.easy) for query in queries],
    }
    scores = {}
    for name, pairs in settings.items():
        if name == "medium" or any(len(positives) for positives, _ in pairs):
            junk = [
                np.concatenate([query.junk, ignored])
                for query, (_, ignored) in zip(queries, pairs, strict=True)
            ]
            scores[name] = score(order, [positives for positives, _ in pairs], junk)
    return scores
