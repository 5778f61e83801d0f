"""What the benchmarks share: interleaved repeats, a table, the machine; the rival pipelines, as the field writes them."""

import atexit
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the scripts and common/; what the tests share
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(work, repeats, clock=time.process_time):
    """Calls each of {name: function} in turn, repeats times over, so that all suffer the same disturbances.
    Returns {name: [seconds of each call]}. clock: by default the processor time of this process, which on a
    shared machine is steadier than the wall's and with one thread on an idle machine the same."""
    for function in work.values():
        function()  # the first call allocates and chooses kernels
    seconds = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def compare(seconds, per, digits=2, unit=1e3):
    """The cells of a row, from measure() of a rival and ours, in this order: median ms per item of both, the
    median over the rounds of the rival's time / ours, and the range of that ratio."""
    theirs, ours = seconds.values()
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    medians = [f"{unit * statistics.median(s) / per:.{digits}f}" for s in (theirs, ours)]
    return [*medians, f"{statistics.median(ratios):.2f}", f"({ratios[0]:.2f} to {ratios[-1]:.2f})"]


def table(rows):
    """Prints rows of cells, the first row as heads: text to the left, the rest to the right."""
    rows = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    print(flush=True)


def machine(threads=1, device="cpu"):
    """Sets torch's threads and prints what the numbers depend on."""
    torch.set_num_threads(threads)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), cpu)
    where = f"{cpu}, {os.cpu_count()} cores, torch threads {threads}"
    if torch.device(device).type == "cuda":
        where += f"; {torch.cuda.get_device_name(device)}"
    print(f"$ {' '.join(['python', os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}")
    print(f"{where}; torch {torch.__version__}; load of the machine {os.getloadavg()[0]:.1f}\n")


def photographs(folder, n, size=(375, 500)):
    """Paths of n JPEG files below the folder. Without one, photograph-like files of this height and width are
    made: noise of all scales, JPEG quality 90."""
    if folder:
        paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not paths:
            raise SystemExit(f"bench: no JPEG files below {folder}")
        print(f"{min(n, len(paths))} photographs of {folder}")
        return [str(paths[i * len(paths) // min(n, len(paths))]) for i in range(min(n, len(paths)))]
    there, generator = tempfile.mkdtemp(prefix="bench-"), torch.Generator().manual_seed(0)
    atexit.register(shutil.rmtree, there)
    print(f"{n} made-up picture(s) of {size[1]} x {size[0]} pixels")
    for i in range(n):
        x = torch.zeros(3, *size)
        for k in range(2, 9):  # amplitudes fall with the frequency, as those of photographs do
            coarse = torch.randn(1, 3, 3 * 2**k // 4, 2**k, generator=generator) * 0.35 * 0.75**k
            x += torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]
        pixels = ((x + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(f"{there}/{i:04d}.jpg", quality=90)
    return [f"{there}/{i:04d}.jpg" for i in range(n)]

# ---- the rival: per image, with PIL, in the workers ----

class Blur:
    """A blur of sigma uniform in [0.1, 2]; PIL's is what MoCo v2 and SimCLR's followers use."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def photometric(blur=True):
    """MoCo v2's augmentation between the crop and the network, with torchvision's transforms on PIL images."""
    return [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.2),
            *[T.RandomApply([Blur()], p=0.5)] * blur, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*IMAGENET)]


def pil_view(size, scale, blur=True):
    return T.Compose([T.RandomResizedCrop(size, scale=scale), *photometric(blur)])


def pil_scalemix(first, second):
    """CutMix's box of the second view in the first."""
    size = first.shape[1]
    side = int(size * (1 - random.random()) ** 0.5)
    y, x = random.randrange(size), random.randrange(size)
    top, bottom, left, right = (min(max(v, 0), size) for v in
                                (y - side // 2, y + side // 2, x - side // 2, x + side // 2))
    first[:, top:bottom, left:right] = second[:, top:bottom, left:right]
    return first


class PILImages(torch.utils.data.Dataset):
    """The field's data set: an image is opened once, and each view is a call of a transform."""

    def __init__(self, paths, views, scalemix=False):
        self.paths, self.views, self.scalemix = paths, views, scalemix

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as f:
            image = Image.open(f).convert("RGB")
        views = [view(image) for view in self.views]
        return [pil_scalemix(*views[:2]), *views[2:]] if self.scalemix else views
