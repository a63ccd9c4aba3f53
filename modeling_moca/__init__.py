"""MoCa models for transformers: importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

from .configuration_moca import MoCaConfig
from .modeling_moca import MoCaForPreTraining, MoCaModel, MoCaPreTrainingOutput
from .processing_moca import MoCaProcessor

AutoConfig.register("moca", MoCaConfig)
AutoModel.register(MoCaConfig, MoCaModel)
AutoModelForPreTraining.register(MoCaConfig, MoCaForPreTraining)
AutoProcessor.register(MoCaConfig, MoCaProcessor)

# Every saved folder carries the code that loads it.
MoCaConfig.register_for_auto_class()
MoCaModel.register_for_auto_class("AutoModel")
MoCaForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MoCaProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MoCaConfig", "MoCaForPreTraining", "MoCaModel", "MoCaPreTrainingOutput", "MoCaProcessor"]
