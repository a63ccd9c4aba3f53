"""What both trainers add to the stock one so that `push_to_hub=True` leaves repositories that load by name."""

import logging
import os
import shutil
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

logger = logging.getLogger(__name__)

STAGE = "_push-"


class HubPushMixin:
    """Beside [`~transformers.Trainer`]: what is pushed is a whole model with its code, processor and card.

    The stock trainer pushes what lies in the output folder: of adapters and of weights that ranks share parts only,
    beside the names of rejected rows, and a pickle of the settings. Here each push is a folder of its own, written as
    `save_model` writes it, and removed once it has been sent; adapters are merged in it. With the strategies
    `"checkpoint"` and `"all_checkpoints"` the training state follows, in a folder of the repository, once the
    checkpoint is whole.

    Pushes during training run beside it, and one that fails is logged, and ends nothing; training waits for the last
    one. `save_model` and `push_to_hub` raise what went wrong.

    A trainer has `_save_whole`, and calls `_push_checkpoint` on all ranks when a checkpoint is whole.
    """

    @cached_property
    def _hub(self):
        return HfApi()

    def init_hf_repo(self, token=None, private=None):
        """Create the repository, and the branch `hub_revision`, unless they exist.

        Args:
            token (`str`, *optional*): with the right to write; `hub_token` when omitted.
            private (`bool`, *optional*): `hub_private_repo` when omitted.
        """
        if not self.is_world_process_zero():
            return
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        output_dir = Path(self.args.output_dir).absolute()
        repo = self._hub.create_repo(
            self.args.hub_model_id or output_dir.name, token=token, private=private, exist_ok=True
        )
        self.hub_model_id, self.push_in_progress = repo.repo_id, None
        if self.args.hub_revision is not None:
            self._hub.create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)
        # Of a run that was killed while it pushed.
        for folder in output_dir.glob(f"{STAGE}*"):
            shutil.rmtree(folder)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Push the model as it is now; on all ranks.

        Args:
            commit_message (`str`, *optional*): of the commit.
            blocking (`bool`, defaults to `True`): wait until it has been sent.
            token (`str`, *optional*): with the right to write; `hub_token` when omitted.
            revision (`str`, *optional*): branch; `hub_revision` when omitted.
            private (`bool`, *optional*): of a repository that is yet to be created; `hub_private_repo` when omitted.
            kwargs: passed on to `create_model_card`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it where `blocking=False`; None on other ranks.
        """
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        folder = self._stage("now", **kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        settings = folder, commit_message, token, revision or self.args.hub_revision
        if blocking:
            return self._upload(*settings)
        job = self._hub.run_as_future(self._upload, *settings)
        self.push_in_progress = PushInProgress([job])
        return job

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing: the stock trainer comes here before the checkpoint is whole."""

    def _push_checkpoint(self, checkpoint_folder):
        """Begin to push the model, and the training state if it is wanted, unless the last push still runs."""
        if not self.args.push_to_hub or self.args.hub_strategy == HubStrategy.END:
            return
        pending = getattr(self, "push_in_progress", None)
        is_busy = pending is not None and not pending.is_done() and not self.args.hub_always_push
        # Only the first rank knows, and all of them save.
        if self.accelerator.reduce(torch.tensor(int(is_busy), device=self.args.device), "sum").item():
            if self.is_world_process_zero():
                logger.info("Step %d is not pushed: the push before it still runs.", self.state.global_step)
            return
        folder = self._stage(self.state.global_step)
        if not self.is_world_process_zero():
            return
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._hub.run_as_future(self._upload, folder, message, None, self.args.hub_revision)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = Path(checkpoint_folder).name
            # Linked, since the checkpoint may be deleted before it has been sent.
            state = os.path.join(self.args.output_dir, STAGE + name)
            shutil.copytree(checkpoint_folder, state, copy_function=_link)
            target = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else name
            settings = state, f"{message}, checkpoint", None, self.args.hub_revision, target
            jobs.append(self._hub.run_as_future(self._upload, *settings))
        earlier = [] if pending is None else [job for job in pending.jobs if not job.done()]
        self.push_in_progress = PushInProgress(earlier + jobs)

    def _stage(self, name, **card_settings):
        """Write what is pushed to a new folder, on all ranks, and return its path."""
        folder = os.path.join(self.args.output_dir, f"{STAGE}{name}")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_whole(folder)
        if self.is_world_process_zero():
            card_settings.setdefault("model_name", self.hub_model_id.rpartition("/")[2])
            # The card is one of this folder, whose files it may look at.
            output_dir, self.args.output_dir = self.args.output_dir, folder
            try:
                self.create_model_card(**card_settings)
            finally:
                self.args.output_dir = output_dir
        return folder

    def _upload(self, folder, message, token, revision, path_in_repo=None):
        """Send a folder, and remove it."""
        try:
            return self._hub.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                path_in_repo=path_in_repo,
                commit_message=message,
                token=token or self.args.hub_token,
                revision=revision,
                # State of another number of ranks must not stay beside this one's.
                delete_patterns="*" if path_in_repo is not None else None,
            )
        except Exception:
            logger.exception("Pushing to %s failed: %s.", self.hub_model_id, message)
            raise
        finally:
            shutil.rmtree(folder)


def _link(source, target):
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


__all__ = ["HubPushMixin"]
