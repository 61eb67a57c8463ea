"""What the things of a composed scene lie on, and what a camera makes of it. Float32 pictures (H, W, 3), 0 to 255.

The ground is noise in earthy colors, with furrows, slopes of light, paths and fallen sticks, or a piece of a given
photograph. Not here: the things (`objects.py`), where they lie (`scenes.py`).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from detection.objects import noise

EARTH = np.array(
    [
        *((46, 58, 30), (88, 104, 52), (122, 132, 74), (150, 146, 92), (64, 82, 58)),  # grass
        *((74, 58, 42), (112, 92, 66), (150, 124, 92), (190, 166, 128), (52, 44, 38)),  # soil and sand
        *((96, 96, 94), (140, 138, 134), (60, 62, 66), (226, 228, 232), (40, 60, 74)),  # stone, snow, water
    ],
    np.float32,
)
LEAF, GRAIN = (1.3, 3.0), (0.05, 0.4)  # pixels; deviation of log brightness


def draw_ground(rng: np.random.Generator, size: tuple[int, int], photographs: Sequence[np.ndarray]) -> np.ndarray:
    """What the things lie on, float32 (H, W, 3)."""
    if photographs and rng.random() < 0.5:
        ground = _crop(rng, photographs[int(rng.integers(len(photographs)))], size)
    else:
        ground = _earth(rng, size)
    if rng.random() < 0.4:
        ground = _clutter(rng, ground)
    canvas = ground.astype(np.float32)
    if rng.random() < 0.3:  # a slope of light
        x, y = np.linspace(-1, 1, size[1], dtype=np.float32), np.linspace(-1, 1, size[0], dtype=np.float32)
        canvas *= (1 + rng.uniform(-0.25, 0.25) * x + rng.uniform(-0.25, 0.25) * y[:, None])[..., None].astype(
            np.float32
        )
    return canvas


def draw_grain(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Factors of the brightness, float32 (H, W, 1): of leaves, a few pixels each."""
    cell = rng.uniform(*LEAF)
    field = noise(rng, *size, ((cell, 1.0), (2 * cell, 0.7), (4 * cell, 0.5)))
    return np.exp(np.float32(rng.uniform(*GRAIN)) * field)[..., None]


def photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Exposure, color of the light, sharpness and sensor noise, uint8 (H, W, 3)."""
    gain = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.04, 3)).astype(np.float32)
    contrast = np.float32(rng.uniform(0.75, 1.2))
    canvas = canvas * (gain * contrast) + (1 - contrast) * np.float32(110)
    level = rng.uniform(0, 7) if rng.random() < 0.7 else 0.0
    if level:
        canvas += rng.standard_normal((*canvas.shape[:2], 1), dtype=np.float32) * np.float32(level)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    choice = rng.random()
    if choice < 0.25:
        blurred = Image.fromarray(image).filter(ImageFilter.BoxBlur(float(rng.uniform(0.3, 1.0))))
        return np.array(blurred)
    if choice < 0.45:
        sharpened = Image.fromarray(image).filter(ImageFilter.UnsharpMask(1.0, int(rng.integers(40, 160)), 2))
        return np.array(sharpened)
    return image


def _crop(rng: np.random.Generator, photograph: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A random piece of a photograph, enlarged up to twice or reduced to a third, mirrored or not."""
    height, width = photograph.shape[:2]
    scale = min(np.exp(rng.uniform(np.log(0.5), np.log(3.0))), height / size[0], width / size[1])
    h, w = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    piece = Image.fromarray(photograph[top : top + h, left : left + w])
    piece = piece.resize((size[1], size[0]), Image.Resampling.BILINEAR, reducing_gap=2.0)
    found = np.asarray(piece)
    return found[:, ::-1] if rng.random() < 0.5 else found


def _earth(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise of several octaves through a palette of three earthy colors, perhaps with furrows, uint8 (H, W, 3)."""
    steep = rng.uniform(0.5, 1.0)
    octaves = tuple((cell, steep**k) for k, cell in enumerate((96, 48, 24, 12, 6, 3)))
    field = noise(rng, *size, octaves)
    if rng.random() < 0.25:
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
        x, y = np.arange(size[1], dtype=np.float32), np.arange(size[0], dtype=np.float32)[:, None]
        phase = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) * np.float32(2 * np.pi / period)
        field += np.float32(rng.uniform(0.2, 1.2)) * np.sin(phase + 0.5 * field)
    chosen = EARTH[rng.choice(len(EARTH), 3, replace=False)] if rng.random() < 0.4 else _meadow(rng)
    palette = np.array([np.interp(np.arange(256), (0, 128, 255), chosen[:, c]) for c in range(3)]).T
    contrast = rng.uniform(25, 75)
    level = np.clip(field * np.float32(contrast / (field.std() + 1e-6)) + rng.uniform(90, 166), 0, 255)
    return np.clip(palette + rng.normal(0, 8, 3), 0, 255).astype(np.uint8)[level.astype(np.uint8)]


def _meadow(rng: np.random.Generator) -> np.ndarray:
    """Three colors near each other: one of the earth, a darker and a lighter one."""
    base = EARTH[int(rng.integers(len(EARTH)))]
    return np.stack([base * rng.uniform(0.5, 0.8), base, base * rng.uniform(1.15, 1.5)]) + rng.normal(0, 8, (3, 3))


def _clutter(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """What belongs to no class: fields, paths, sticks and specks."""
    height, width = ground.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(ground))
    draw = ImageDraw.Draw(picture)

    def spot() -> np.ndarray:
        return rng.uniform(-0.1, 1.1, 2) * (width, height)

    def tint(low: float, high: float) -> tuple[int, ...]:
        y, x = int(rng.integers(height)), int(rng.integers(width))
        return tuple(int(v) for v in np.clip(ground[y, x] * rng.uniform(low, high) + rng.normal(0, 6, 3), 0, 255))

    if rng.random() < 0.3:  # the border of a field, right across
        middle, along = spot(), rng.standard_normal(2)
        along *= 2 * max(size for size in (width, height)) / np.hypot(*along)
        across = np.array([-along[1], along[0]])
        corners = [middle - along, middle + along, middle + along + across, middle - along + across]
        draw.polygon([tuple(corner) for corner in corners], fill=tint(0.7, 1.3))
    for _ in range(int(rng.integers(0, 3))):  # paths
        points = [tuple(spot()) for _ in range(3)]
        draw.line(points, fill=tint(0.7, 1.5), width=int(rng.integers(3, 16)), joint="curve")
    for _ in range(int(rng.integers(0, 10))):  # sticks, perhaps with twigs
        start = spot()
        end = start + rng.normal(0, 35, 2)
        color = tint(1.3, 2.2) if rng.random() < 0.7 else tint(0.2, 0.6)
        draw.line([tuple(start), tuple(end)], fill=color, width=int(rng.integers(1, 4)))
        for share in rng.uniform(0.2, 1, int(rng.integers(0, 5))):
            at = start + share * (end - start)
            draw.line([tuple(at), tuple(at + rng.normal(0, 7, 2))], fill=color, width=1)
    for x, y in rng.uniform(0, 1, (int(rng.integers(0, 60)), 2)) * (width, height):  # specks
        radius = rng.uniform(0.5, 2.5)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tint(0.5, 1.6))
    return np.asarray(picture)
