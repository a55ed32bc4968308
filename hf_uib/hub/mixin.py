"""What a trainer publishes: adapter, merged model and their cards."""

import os
import shutil
from functools import partial

from transformers.trainer_utils import HubStrategy
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, PushInProgress

from ..checkpointing import AtomicCheckpoints, atomic_directory
from ..provenance import STATE_NAME
from .card import FIGURES, write_card
from .push import ADAPTER_PATTERNS, MERGED, upload_copy


class HubMixin(AtomicCheckpoints):
    """Pushes, cards and the merged model of a `UIBTrainer`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, without the pickled arguments, which hold the token: adapter, state and card, then the whole checkpoint
        where `hub_strategy` asks for it."""
        args = self.args
        if self._staging or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if args.hub_artifact == "merged":  # nothing to push before there is one
            return
        before = self.push_in_progress
        under_way = before is not None and not before.is_done()
        if under_way and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        named = "" if self.adapter_name == "default" else self.adapter_name  # PEFT's folder for it
        os.makedirs(os.path.join(args.output_dir, named), exist_ok=True)
        for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
            name = os.path.join(named, name)
            shutil.copy(os.path.join(checkpoint_folder, name), os.path.join(args.output_dir, name))
        for name in (STATE_NAME, "README.md"):
            shutil.copy(os.path.join(checkpoint_folder, name), os.path.join(args.output_dir, name))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(args.output_dir)
        upload = partial(
            upload_copy,
            self._hub,
            repo_id=self.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        jobs = [upload(args.output_dir)]
        if args.hub_strategy != HubStrategy.EVERY_SAVE:
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else os.path.basename(checkpoint_folder)
            jobs.append(upload(checkpoint_folder, path_in_repo=name))
        self.push_in_progress = PushInProgress(jobs + before.jobs if before is not None and under_way else jobs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As Trainer's; ``args.hub_artifact`` says whether adapter, merged model or both go up.

        Args:
            commit_message, blocking, token, revision, private: as in Trainer.
            kwargs: for the card, see `create_model_card`; remembered for later ones.

        Returns:
            What was committed to ``hub_model_id``, or its future.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.card_settings |= kwargs
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
            self.create_model_card()  # which now knows the repository's name
        merged = os.path.join(args.output_dir, MERGED)
        if args.hub_artifact != "adapter":
            self.save_merged(merged)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        token, revision = token or args.hub_token, revision or args.hub_revision
        settings = {"token": token, "revision": revision, "commit_message": commit_message}
        upload_merged = partial(
            self._hub.upload_folder,
            folder_path=merged,
            delete_patterns=ADAPTER_PATTERNS,
            run_as_future=not blocking,
            **settings,
        )
        if args.hub_artifact == "merged":
            return upload_merged(repo_id=self.hub_model_id)
        if args.hub_artifact == "both":
            private = self._hub.repo_info(self.hub_model_id, token=token).private
            beside = self._hub.create_repo(f"{self.hub_model_id}-merged", token=token, private=private, exist_ok=True)
            if revision is not None:
                self._hub.create_branch(beside.repo_id, branch=revision, token=token, exist_ok=True)
            upload_merged(repo_id=beside.repo_id)
        job = upload_copy(self._hub, args.output_dir, repo_id=self.hub_model_id, **settings)
        return job.result() if blocking else job

    def save_merged(self, folder: str) -> None:
        """Write the merged model, its processor and its card to ``folder``, all or nothing."""
        merged = self.merge_and_unload()
        if not self.args.should_save:
            return
        with atomic_directory(folder) as unfinished:
            merged.save_pretrained(unfinished)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(unfinished)
            for figure in FIGURES:
                if os.path.isfile(os.path.join(self.args.output_dir, figure)):
                    shutil.copy(os.path.join(self.args.output_dir, figure), unfinished)
            self.create_model_card(folder=unfinished, merged=True)

    def create_model_card(  # type: ignore[override]
        self, *, folder: str | None = None, merged: bool = False, **settings
    ) -> None:
        """Writes the unlearning card to ``folder`` (the output folder by default); see `hf_uib.hub.card`.

        Args:
            merged: the card of the merged model.
            settings: as Trainer's: ``license``, ``language``, ``tags``, ``model_name``, ``finetuned_from``, ``dataset_tags``,
                ``dataset``.
        """
        if self.is_world_process_zero():
            write_card(self, folder or self.args.output_dir, merged, **(self.card_settings | settings))
