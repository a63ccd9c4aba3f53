"""What both trainers add to the stock one so that `save_model` leaves a whole model."""

from transformers.integrations import is_deepspeed_zero3_enabled

from .adapters import is_adapted
from .sharding import sum_in_float32, whole_weights


class WholeModelMixin:
    """Beside [`~transformers.Trainer`]: a final folder that holds every weight, whatever checkpoints hold.

    A trainer calls `_begin_sharding` when it is made; its `_save` merges adapters while `_saves_whole` is set. The
    folder also holds the run's record ([`trainers.recorded.RecordMixin`]).
    """

    _saves_whole = False

    def _begin_sharding(self, model):
        """Refuse adapters (inside or around `model`) where ranks share weights; else let such ranks sum precisely."""
        if is_adapted(model) and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "Adapters need whole weights on every rank: use plain data parallelism or ZeRO-2, or train all weights."
            )
        sum_in_float32(self.accelerator)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save a whole folder, which `from_pretrained` loads, also of weights that ranks share and of adapters.

        Checkpoints during training hold parts, or adapters alone. With `push_to_hub` the model is pushed, too.

        Args:
            output_dir (`str`, *optional*): where to; the folder of the run when omitted.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self._save_whole(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def _save_whole(self, output_dir):
        self._saves_whole = True
        try:
            with whole_weights(self.accelerator):
                super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self._write_record(self.args.output_dir if output_dir is None else output_dir)
        finally:
            self._saves_whole = False


__all__ = ["WholeModelMixin"]
