"""What a trainer publishes: adapter, merged model and their cards."""

import os
import shutil
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import HfApi
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..checkpointing import AtomicCheckpoints, atomic_directory, files_in
from ..data.fingerprints import fingerprint
from ..models import input_kind, labels_tokens
from ..quantised import quantisation_of
from ..serialization import is_marked
from .card import FIGURES, DataSummary, UnlearningCardData, emissions_of, settings_of, write_card
from .push import ADAPTER_PATTERNS, MERGED, published, upload_files

if TYPE_CHECKING:
    from ..audit.report import AuditReport
    from ..config import UIBConfig


CHANNELS = {  # for the pattern: by the statistic that tells whether one is closed
    "noise_to_signal": "noise along the subspace in which forget and retained data differ",
    "swap_fraction": "the pattern's tokens drawn from forget rows whatever the label",
}


class HubMixin(AtomicCheckpoints):
    """Pushes, cards and the merged model of a `UIBTrainer`, whose ``__init__`` sets all of these.

    Attributes:
        request: what is to be forgotten, in words.
        dataset_name: Hub id of all sets; base_name: of the model before.
        forget_dataset, retain_dataset, calibration_dataset: encoded rows, or None; raw_eval_dataset: as it was given.
        fingerprints: hashes of the rows as they were given, by ``forget_dataset`` and so on.
        layers: adapted layers by name; adapter_name: PEFT's.
        prior: its class is named, and ``level`` and ``target`` are asked where it has them.
        results: rows of the results table, by model; audit_report: of the last audit.
        card_settings: arguments of `create_model_card` that later cards take over.
    """

    _tag_names: ClassVar[list[str]]
    _paper: ClassVar[dict[str, str]]
    _hub: HfApi
    raw_eval_dataset: Any
    args: "UIBConfig"
    model: PeftModel
    push_in_progress: PushInProgress | None  # type: ignore[assignment]
    request: str
    dataset_name: str | None
    base_name: str | None
    forget_dataset: Any
    retain_dataset: Any
    calibration_dataset: Any
    fingerprints: dict[str, str]
    layers: dict[str, Any]
    adapter_name: str
    prior: Any
    _merged_into: str | None
    results: dict[str, dict]
    audit_report: "AuditReport | None"
    card_settings: dict[str, Any]

    if TYPE_CHECKING:  # properties and methods of the trainer

        @property
        def statistics(self) -> dict[str, float]:
            """``noise_to_signal``, ``prior_strength``, ``kept_fraction``, ``pattern_z`` and so on, as far as they were measured."""

        @property
        def provenance(self) -> list[dict]:
            """Records of every request of the model, this run's last."""

        @property
        def base_fingerprint(self) -> str:
            """Hash of the weights before unlearning."""

        @property
        def run_warnings(self) -> list[str]:
            """Why the run cannot have unlearned."""

        @property
        def evaluated(self) -> dict[str, dict[str, float]]:
            """What `evaluate` returned, by set."""

        def refuse_unmoved(self) -> None:
            """Refuse a model that is the one before unlearning."""

        @property
        def compared(self) -> bool:
            """Whether forget and retained rows were compared."""

        def merge_and_unload(self) -> PreTrainedModel:
            """A plain model with the adapter merged into its weights."""

    # ---- Pushing ----------------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, without the pickled arguments, which hold the token.

        Pushes adapter, state and card, then the whole checkpoint where `hub_strategy` asks for it.
        """
        args = self.args
        if self._staging or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if args.hub_artifact == "merged":  # nothing to push before there is one
            return
        before: Any = self.push_in_progress
        running = list(before.jobs) if before is not None and not before.is_done() else []
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        upload = partial(
            upload_files,
            self._hub,
            checkpoint_folder,
            repo_id=self.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        jobs: Any = [upload(published(checkpoint_folder, self.written[os.path.abspath(checkpoint_folder)]))]
        if args.hub_strategy != HubStrategy.EVERY_SAVE:
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else os.path.basename(checkpoint_folder)
            # The folder was made a moment ago: what is in it is Trainer's
            jobs.append(upload(files_in(checkpoint_folder), path_in_repo=name))
        self.push_in_progress = PushInProgress(jobs + running)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Any:
        """As Trainer's; ``args.hub_artifact`` says whether adapter, merged model or both go up.

        Args:
            commit_message, blocking, token, revision, private: as in Trainer.
            kwargs: for the card, see `create_model_card`; remembered for later ones.

        Returns:
            `CommitInfo` of ``hub_model_id``, or its future; None on other processes than the first.

        Raises:
            ValueError: training left the adapter as it was.
        """
        args = self.args
        self.refuse_unmoved()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.card_settings |= kwargs
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
            self.create_model_card()  # which now knows the repository's name
        merged = os.path.join(self._output_dir, MERGED)
        if args.hub_artifact != "adapter":
            self.save_merged(merged)
        if not self.is_world_process_zero() or self.hub_model_id is None:
            return None
        self._finish_current_push()
        token, revision = token or args.hub_token, revision or args.hub_revision
        settings: dict[str, Any] = {"token": token, "revision": revision, "commit_message": commit_message}
        jobs = []
        if args.hub_artifact != "adapter":
            whole = args.hub_artifact == "merged"
            target = self.hub_model_id if whole else self._repository_beside(self.hub_model_id, token, revision)
            jobs.append(self._upload(merged, repo_id=target, delete_patterns=ADAPTER_PATTERNS, **settings))
        if args.hub_artifact != "merged":
            jobs.append(self._upload(self._output_dir, repo_id=self.hub_model_id, **settings))
        return [job.result() for job in jobs][-1] if blocking else jobs[-1]

    def _upload(self, folder: str, **settings) -> Future:
        """In the background: what this trainer wrote to a folder, and our figures and reports in it."""
        return upload_files(self._hub, folder, published(folder, self.written[os.path.abspath(folder)]), **settings)

    def published_files(self) -> list[str]:
        """Of the output folder: what would be pushed of it, and of the merged model in it; relative paths."""
        folder = self._output_dir
        merged = os.path.join(folder, MERGED)
        inside = published(merged, self.written.get(os.path.abspath(merged), ()))
        own = published(folder, self.written.get(os.path.abspath(folder), ()))
        return sorted(own) + [os.path.join(MERGED, name) for name in sorted(inside)]

    def _repository_beside(self, repository: str, token: str | None, revision: str | None) -> str:
        """Id of the merged model's repository, as private as the adapter's."""
        private = self._hub.repo_info(repository, token=token).private
        beside = self._hub.create_repo(f"{repository}-merged", token=token, private=private, exist_ok=True).repo_id
        if revision is not None:
            self._hub.create_branch(beside, branch=revision, token=token, exist_ok=True)
        return beside

    # ---- Writing ----------------------------------------------------------------------------------------------------

    def save_merged(self, folder: str) -> None:
        """Write the merged model, its processor and its card to ``folder``, all or nothing.

        Raises:
            ValueError: training left the adapter as it was.
        """
        self.refuse_unmoved()
        merged = self.merge_and_unload()
        if not self.args.should_save:
            return
        with atomic_directory(folder) as unfinished:
            merged.save_pretrained(unfinished)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(unfinished)
            for figure in FIGURES:
                if is_marked(os.path.join(self._output_dir, figure)):
                    shutil.copy(os.path.join(self._output_dir, figure), unfinished)
            self.create_model_card(folder=unfinished, merged=True)
            self.written[os.path.abspath(folder)] = files_in(unfinished)

    def create_model_card(  # type: ignore[override]
        self, *, folder: str | None = None, merged: bool = False, **settings
    ) -> None:
        """Write the unlearning card to ``folder`` (the output folder by default); see `hf_uib.hub.card`.

        Args:
            merged: the card of the merged model.
            settings: as Trainer's: ``license``, ``language``, ``tags``, ``model_name``, ``finetuned_from``, ``dataset_tags``,
                ``dataset``.
        """
        if self.is_world_process_zero():
            write_card(self.card_data(merged, **settings), folder or self._output_dir)

    def card_data(self, merged: bool = False, **settings) -> UnlearningCardData:
        """What a card or a deletion report can say of the run.

        Args:
            merged: for the card of the merged model.
            settings: of `create_model_card`; they go before the remembered ones.
        """
        settings = self.card_settings | settings
        model = self.accelerator.unwrap_model(self.model)
        repository = self.hub_model_id or self.args.hub_model_id
        title = settings.pop("model_name", None) or os.path.basename(repository or os.path.abspath(self._output_dir))
        if repository and merged:  # which of an adapter's repository is not the merged model's
            repository = {"both": f"{repository}-merged", "merged": repository}.get(self.args.hub_artifact)
        return UnlearningCardData(
            title=title,
            request=self.request,
            requests=self.provenance,
            base=settings.pop("finetuned_from", None) or self.base_name,
            base_revision=getattr(model.config, "_commit_hash", None),
            base_fingerprint=self.base_fingerprint,
            repository=repository,
            merged=merged,
            adapter_folder=self._adapter_folder,
            kind="token" if labels_tokens(model) else input_kind(model),
            data_sets=self._data_summaries(),
            dataset_name=self.dataset_name,
            retained=self.retain_dataset is not None,
            calibrated=self._is_calibrated(),
            channels=self._closed_channels,
            prior=type(self.prior).__name__,
            steps=self.state.global_step,
            settings=self._shown_settings(),
            measured=self._strengths(),
            pattern_z=self.statistics.get("pattern_z") if self.compared else None,
            token_z=self.statistics.get("token_z"),
            mean_token_z=self.statistics.get("mean_token_z"),
            mean_token_effect_z=self.statistics.get("mean_token_effect_z"),
            results=self.results,
            evaluated=self.evaluated,
            warnings=self.run_warnings,
            quantisation=quantisation_of(model),
            merged_into=self._merged_into,
            audit=self.audit_report,
            emissions=emissions_of(self.callback_handler.callbacks),
            own_tags=self._tag_names,
            paper=self._paper,
            **settings,
        )

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    @property
    def _adapter_folder(self) -> str | None:
        """PEFT's folder for an adapter of another name than ``default``."""
        return None if self.adapter_name == "default" else self.adapter_name

    @property
    def _closed_channels(self) -> list[str]:
        """The channels for the pattern that are closed, in words."""
        return [words for name, words in CHANNELS.items() if self.statistics.get(name, 0) > 0]

    def _is_calibrated(self) -> bool:
        """Whether the level to forget to was measured on a calibration set."""
        measured = getattr(self.prior, "level", None) is not None and getattr(self.prior, "target", None) is None
        return measured and self.calibration_dataset is not None and self.prior.needs_forget_batches

    def _shown_settings(self) -> dict[str, Any]:
        adapter: Any = self.model.peft_config[self.adapter_name]
        lora = f"r {adapter.r}, alpha {adapter.lora_alpha}, on {len(self.layers)} layers"
        return settings_of(self.args) | {"LoRA": lora}

    def _strengths(self) -> dict[str, float]:
        """Strengths that were in force and, in words, where they came from."""
        found = {}
        for name in ("noise_to_signal", "prior_strength", "kept_fraction"):
            if (value := self.statistics.get(name)) is not None:
                own = getattr(self.args, name, None) is None and name != "prior_strength"
                found[f"{name}{', measured' if own else ' in force'}"] = round(value, 4)
        for name, when in (("pattern_effect", "before"), ("pattern_effect_left", "after")):
            if name in self.statistics:
                found[f"effect of the pattern's tokens on unseen rows' margins, {when}, nats"] = round(
                    self.statistics[name], 2
                )
        return found

    def _data_summaries(self) -> list[DataSummary]:
        """Name, size and fingerprint of every set, as it was given."""
        test = self.raw_eval_dataset
        if isinstance(test, dict) or not hasattr(test, "__len__"):
            test = None
        elif "eval_dataset" not in self.fingerprints:
            self.fingerprints["eval_dataset"] = fingerprint(test)
        sets = {
            "forget": self.forget_dataset,
            "retain": self.retain_dataset,
            "calibration": self.calibration_dataset,
            "eval": test,
        }
        return [
            DataSummary(name, len(rows), self.fingerprints[f"{name}_dataset"])
            for name, rows in sets.items()
            if rows is not None
        ]
