"""What papers report of a task, to stand beside what is measured here: mean PSNR over CIFAR-10."""

from typing import NamedTuple

from jaxinv import networks
from jaxinv.client import Local
from jaxinv.reporting.study import CellSummary

TRAINED = 0.5  # test accuracy from which a victim is one of the papers' trained networks


class Published(NamedTuple):
    """A figure of a paper: PSNR in dB, mean and standard deviation over its images."""

    psnr: float
    std: float
    attack: str
    source: str

    @property
    def words(self) -> str:
        """By what and by whom: "cosine + TV (Geiping et al. 2020)"."""
        return f"{self.attack} ({self.source})"


GEIPING = "Geiping et al. 2020"
COSINE = "cosine + TV"

# By network, width, whether it is trained, and images in one gradient: the highest figure known to
# us. Other images than a study's, and one start each.
PUBLISHED = {
    ("lenet_zhu", None, False, 1): Published(46.25, 12.66, "Euclidean + L-BFGS", GEIPING),
    ("lenet_zhu", None, True, 1): Published(18.08, 4.27, COSINE, GEIPING),
    ("resnet20", 64, False, 1): Published(19.83, 2.96, COSINE, GEIPING),
    ("resnet20", 64, True, 1): Published(13.95, 3.38, COSINE, GEIPING),
    ("convnet", 64, False, 4): Published(16.92, 2.10, COSINE, GEIPING),
    ("convnet", 64, False, 8): Published(16.49, 1.02, COSINE, GEIPING),
}


def published(cell: CellSummary) -> Published | None:
    """What was published of a cell's task; None where nothing like it was."""
    asked = cell.asked
    plain = dict(dataset="cifar10", defense="none", server="honest", batch_norm="eval")
    steps = Local(asked["client_epochs"], asked["client_batch"]).steps(asked["images"])
    if steps > 1 or any(asked[name] != value for name, value in plain.items()):
        return None
    accuracy = cell.facts["victim_accuracy"]
    if asked["victim"] is not None and not accuracy >= TRAINED:
        return None  # neither untrained nor trained
    usual = networks.NETWORKS[asked["model"]].width
    width = usual if asked["width"] is None else asked["width"]
    return PUBLISHED.get((asked["model"], width, asked["victim"] is not None, asked["images"]))
