"""Frechet distances of a student's and its teacher's images to others of the teacher's, on components of pixels."""

from dataclasses import replace
from pathlib import Path

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.components import NAME, PixelComponents, pixel_components
from ldm_dkdm.evaluation.gathering import gather, statistics_cache
from ldm_dkdm.evaluation.metrics import Pair, pixel_frechet
from ldm_dkdm.evaluation.samples import Clock, ModelImages
from ldm_dkdm.evaluation.sources import ImageSource
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.files import expanded
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.ranks import joined
from ldm_dkdm.reporting import Progress


def distances(
    student: DiffusionModel,
    teacher: DiffusionModel,
    config: SamplingConfig,
    cache: str | Path | None = None,
    progress: bool | Progress = False,
) -> dict[str, float]:
    """Frechet distances on 64 principal components of the reference's pixels, and images a second.

    The reference are images of the teacher. frechet_student_to_teacher is what `measure` calls pixel Frechet, of the
    same numbers. frechet_teacher_to_teacher is that of the teacher's images from the student's seeds: what a perfect
    student would have. Statistics are streamed, cached and resumed by `gather`.

    Args:
        student, teacher: on the devices where they compute.
        config: image i of the student depends on config.seed + i, of the reference on config.seed + config.count + i.
        cache: folder of statistics; default: `statistics_cache()`.
        progress: bars, or a function.

    Returns:
        Distances, and images a second of either model, of which images were drawn and not only reused.
    """
    folder, clocks = statistics_cache() if cache is None else expanded(cache), (Clock(), Clock())
    names = str(student.path or "student"), str(teacher.path or "teacher")
    others = replace(config, seed=config.seed + config.count)
    reference: ImageSource = ModelImages(teacher, others, names[1], clocks[1])
    components, reference = pixel_components(reference, folder, config.batch_size, progress)

    def moments(source: ImageSource) -> Statistics:
        options = {"cache": folder, "batch_size": config.batch_size, "progress": progress}
        return gather(source, {NAME: components}, set(), **options)[NAME]  # type: ignore[arg-type]  # a dict

    wanted = moments(reference)
    own = ModelImages(student, config, names[0], clocks[0])
    again = ModelImages(teacher, config, f"{names[1]} with the student's seeds", clocks[1])
    sets = {"frechet_teacher_to_teacher": again, "frechet_student_to_teacher": own}
    found = {name: _distance(moments(source), wanted, components) for name, source in sets.items()}
    rates = {"teacher": clocks[1].rate, "student": clocks[0].rate}
    drawn = {f"{name}_images_per_second": sum(joined().gather(rate)) for name, rate in rates.items()}
    return found | {name: round(rate, 2) for name, rate in drawn.items() if rate}


def _distance(samples: Statistics, reference: Statistics, components: PixelComponents) -> float:
    """The figure of `pixel_frechet`; of several ranks the first computes it."""
    return joined().on_first(lambda: pixel_frechet(Pair(samples, reference, components))["pixel Frechet"])
