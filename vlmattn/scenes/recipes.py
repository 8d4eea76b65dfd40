"""The settings that the version of a shipped checkpoint is trained with, and the checks that its runs must pass."""

from __future__ import annotations

from .plateaus import Bound, Check
from .stages import Settings
from .versions import VERSION_2, VERSION_QWEN

RECIPES = {
    VERSION_2.name: Settings(
        version=VERSION_2.name,
        seed=11,
        pretraining_steps=600,
        steps=1800,
        habit_steps=20,
        curriculum=50,
        precision="bfloat16",
    ),
    VERSION_QWEN.name: Settings(
        version=VERSION_QWEN.name,
        seed=11,
        pretraining_steps=700,
        pretraining_batch=32,
        steps=1000,
        several_steps=300,
        habit_steps=20,
        curriculum=30,
        precision="bfloat16",
        decoder_from="scenes-llava",
    ),
}
"""By name of the version."""
CHECKS = {
    VERSION_2.name: (
        Check(300, (Bound("loss", below=1.3), Bound("loc", above=0.5)), enough=1),
        Check(600, (Bound("cell", above=0.5), Bound("color", above=0.8)), enough=2),
    ),
}
"""By name of the version; a version without an entry is not checked."""
