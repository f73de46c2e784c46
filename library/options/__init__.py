"""Options: one group for each concern. Other rooms import the groups from here and take those that they need."""

from library.options.control import ConditioningOptions, ControlFileOptions, ControlNetOptions, LLLiteOptions
from library.options.data import CacheOptions, CacheToolOptions, DataOptions, MaskOptions, TextCacheOptions
from library.options.embedding import EmbeddingOptions
from library.options.full import DreamBoothOptions, FineTuneOptions, FullOptions, SdxlFullOptions
from library.options.model import ModelOptions, PrecisionOptions
from library.options.network import NetworkOptions
from library.options.saving import (
    ConfigOptions,
    ConsoleOptions,
    HubOptions,
    LogOptions,
    MetadataOptions,
    ModelFileOptions,
    NetworkFileOptions,
    SampleOptions,
    SaveOptions,
)
from library.options.training import (
    EmaOptions,
    LoopOptions,
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    ScheduleOptions,
    ValidationOptions,
)

__all__ = [
    "CacheOptions",
    "CacheToolOptions",
    "ConditioningOptions",
    "ConfigOptions",
    "ConsoleOptions",
    "ControlFileOptions",
    "ControlNetOptions",
    "DataOptions",
    "DreamBoothOptions",
    "EmaOptions",
    "EmbeddingOptions",
    "FineTuneOptions",
    "FullOptions",
    "HubOptions",
    "LLLiteOptions",
    "LogOptions",
    "LoopOptions",
    "LossOptions",
    "MaskOptions",
    "MetadataOptions",
    "ModelFileOptions",
    "ModelOptions",
    "NetworkFileOptions",
    "NetworkOptions",
    "NoiseOptions",
    "OptimizerOptions",
    "PrecisionOptions",
    "SampleOptions",
    "SaveOptions",
    "ScheduleOptions",
    "SdxlFullOptions",
    "TextCacheOptions",
    "ValidationOptions",
]
