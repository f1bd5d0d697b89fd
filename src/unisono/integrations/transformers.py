"""transformers' ``Trainer``, trained by unisono: a fine-tuning script imports it, and its arguments, from here.

transformers' own are model, optimizer, schedule, loss, logging, metrics and callbacks. unisono's are the loop, the division of
work, sum, update, evaluation's passes and checkpoints. ``docs/integrations.md`` says what each argument means here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import RandomSampler, SequentialSampler
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_pt_utils import find_batch_size, nested_numpify
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    SaveStrategy,
    denumpify_detensorize,
    get_last_checkpoint,
    rotate_checkpoints,
)

from unisono.data.loader import Loader
from unisono.errors import ConfigurationError
from unisono.integrations.transformers_arguments import (
    Plan,
    SeededSampler,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    own_arguments,
)
from unisono.training.callbacks import Callback
from unisono.training.step import StepResult
from unisono.training.trainer import Trainer as ExactTrainer
from unisono.world import World

__all__ = ["Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]

_STATE_FILE = "trainer_state.json"
_UNREACHED_METHODS = {
    "training_step": "unisono runs backward and the update: override compute_loss",
    "get_train_dataloader": "override _get_train_sampler for another order, or pass a data_collator",
    "get_batch_samples": "unisono loads the batches: change the data set or the data_collator",
}
_UNREACHED_EVENTS = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step")
_TIMES = ("_runtime", "_per_second")


class TransformersTrainer(transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with the same weights on any number of workers. Imported as ``Trainer``.

    *Collective*: every worker makes one with equal arguments, and calls ``train``, ``evaluate`` and ``predict`` alike. The files
    of the run are in ``output_dir/unisono``: ``train()`` goes on from the checkpoint there, on any number of workers.

    Args:
        model, args, more: As for ``transformers.Trainer``. ``args`` may be transformers' own where no launcher has told
            accelerate of other processes; else those of this module.
        unisono: Arguments of ``unisono.Trainer`` that ``args`` do not decide: ``microbatches``, ``sync``, ``strict``,
            ``timeout_s`` and others. By default there are as many microbatches as the smallest multiple of
            ``gradient_accumulation_steps`` from 8 on.

    Raises:
        ConfigurationError: Something in ``args``, in a subclass or in a callback cannot be kept, by name.
    """

    state: Any
    control: Any

    def __init__(
        self, model: Any = None, args: Any = None, *more: Any, unisono: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        self._settings = {**vars(self).get("_settings", {}), **(unisono or {})}
        self._exact: ExactTrainer | None = None
        self._plan: Plan | None = None
        self._ignored: list[str] | None = None
        self._start_time = time.time()
        for name, advice in _UNREACHED_METHODS.items():
            if getattr(type(self), name) is not getattr(transformers.Trainer, name):
                raise ConfigurationError(f"{type(self).__name__} overrides {name}, which is not called: {advice}")
        given = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        super().__init__(model, own_arguments(given, self._rank), *more, **others)

    def _rank(self) -> int:
        """Of this worker, by now."""
        collective = self._settings.get("collective") if self._exact is None else self._exact.collective
        return World.from_environment().rank if collective is None else int(collective.rank)

    @property
    def exact(self) -> ExactTrainer:
        """*collective*, the first time. The ``unisono.Trainer`` that does the work, resumed from the newest checkpoint."""
        if self._exact is None:
            self._exact = self._make()
        if self._exact.model is not self.model:
            raise ConfigurationError("the model was replaced after the first evaluate() or train(): make a new Trainer for it")
        return self._exact

    def _make(self) -> ExactTrainer:
        args, settings = self.args, dict(self._settings)
        plan = Plan.of(
            args, self.train_dataset if self.train_dataset is not None else [0] * 8, settings.pop("microbatches", None)
        )
        if self.train_dataset is not None:
            self._plan = plan
            self.create_optimizer()
            self.create_scheduler(plan.max_steps)
        else:  # for evaluation alone, and never stepped
            self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        self._init_training_state(plan.max_steps, plan.steps_per_epoch, -(-plan.max_steps // plan.steps_per_epoch), None, None)
        self._tr_loss = torch.zeros((), dtype=torch.float64)
        # The loss that train() returns is that of the whole run, whatever interrupted it.
        self._total_loss_scalar, self._globalstep_last_logged, self._initial_global_step = 0.0, 0, 0
        self._must_save = False
        return ExactTrainer(
            self.model,
            self.optimizer,
            self._loss,
            batch_size=plan.batch_size,
            microbatches=plan.microbatches,
            seed=args.seed,
            run_dir=self._run_dir,
            scheduler=None if self._follows_metrics else self.lr_scheduler,
            max_grad_norm=args.max_grad_norm or None,
            precision="bf16" if args.bf16 else "fp32",
            checkpoint_every=sys.maxsize,  # when transformers' control says so
            keep=args.save_total_limit or 3,
            device=settings.pop("device", args.device),
            callbacks=[_Follower(self)],
            **settings,
        )

    @property
    def _run_dir(self) -> str | None:
        saves = self.train_dataset is not None and self.args.save_strategy != SaveStrategy.NO
        return os.path.join(self.args.output_dir, "unisono") if saves else None  # noqa: PTH118 - may be no path of this machine

    @property
    def _follows_metrics(self) -> bool:
        """Whether the schedule is stepped with what evaluations measure, which transformers does."""
        return isinstance(self.lr_scheduler, (ReduceLROnPlateau, GreedyLR))

    def _check_callbacks(self) -> None:
        for callback in self.callback_handler.callbacks:
            for event in _UNREACHED_EVENTS:
                theirs = getattr(type(callback), event)
                if theirs is not getattr(transformers.TrainerCallback, event) and not _is_transformers(theirs):
                    raise ConfigurationError(
                        f"the callback {type(callback).__name__} has {event}, which is not called: gradients and batches are "
                        "divided between workers inside a step. Use on_step_begin, on_step_end or on_evaluate"
                    )

    # ------------------------------------------------------------------ the loss

    def _loss(self, model: Any, inputs: Any) -> tuple[Tensor, int]:
        """The loss as ``compute_loss`` gives it, a mean over the labels of the microbatch, as sum and count."""
        self._follow_position()  # a step that is taken again sees the state that it saw the first time
        items = self._items(inputs)
        if not items:
            return torch.zeros(()), 0
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        known = torch.tensor(items, device=self.args.device) if counts and "labels" in inputs else None
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=known)
        return loss * items, items

    def _items(self, inputs: Any) -> int:
        """Labels that are not ignored, as transformers counts them; samples, where labels are no tensor."""
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs.get("labels")
            if self._loss_shifts_labels and isinstance(labels, Tensor):
                labels = labels[..., 1:]
        return int(labels.ne(-100).sum()) if isinstance(labels, Tensor) else int(find_batch_size(inputs))

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """They are on the device. A dict of its own, from which ``compute_loss`` may take labels out."""
        return {**inputs}

    # ------------------------------------------------------------------ training

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """What ``train`` calls when the model is prepared."""
        if self.train_dataset is None:
            raise ConfigurationError("train() needs data: pass train_dataset to Trainer")
        self._check_callbacks()
        self._ignored, self._start_time = ignore_keys_for_eval, time.time()
        data = self._get_dataloader(self.train_dataset, "Training", self._train_batch_size)
        exact, plan = self.exact, self._plan
        assert plan is not None
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = data
        if self.args.eval_on_start:
            self._evaluate(None, ignore_keys_for_eval, skip_scheduler=True)
        drop_last = self.args.dataloader_drop_last
        summary = exact.fit(
            data.dataset, steps=plan.max_steps, order=self._order(data.dataset), drop_last=drop_last, loader=self._loader(data)
        )
        if self._run_dir is not None and self.state.global_step != summary.steps:
            # The others had finished before this worker came.
            self._load_state(Path(self._run_dir, _STATE_FILE).read_text())
        return self._finalize_training(None, plan.samples, self._start_time)

    def _order(self, dataset: Any) -> Any:
        sampler, seed = self._get_train_sampler(dataset), self.args.data_seed
        if type(sampler) is SequentialSampler:
            return "sequential"
        if seed is not None and seed != self.args.seed:
            return SeededSampler(sampler, seed)
        is_plain = type(self)._get_train_sampler is transformers.Trainer._get_train_sampler
        return "shuffle" if type(sampler) is RandomSampler and is_plain else sampler

    def _loader(self, data: Any) -> Loader:
        return Loader(
            num_workers=data.num_workers,
            collate_fn=data.collate_fn,
            pin_memory=None if self.args.dataloader_pin_memory else False,
            prefetch_factor=data.prefetch_factor or 2,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _begin(self) -> None:
        """*local*. Steps will follow: after a start, a resume, or on a worker that joins."""
        self._follow_position()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    def _end_step(self, result: StepResult) -> None:
        """*collective*. transformers' events after a step, and what its control asks for."""
        self._follow_position()
        self._follow_rank()
        self._tr_loss += result.loss
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._log_evaluate_save(result)
        ends_epoch = self.exact.position.batch == 0
        if ends_epoch or self.control.should_training_stop:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._log_evaluate_save(result)
        if self.control.should_epoch_stop:
            raise ConfigurationError(
                "a callback has set control.should_epoch_stop, but an epoch cannot end early: each of its samples is used once. "
                "Set control.should_training_stop, or max_steps"
            )
        if self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            self.exact.finish()
        if self._run_dir is not None and self._rank() == 0 and self._ends_here:
            Path(self._run_dir, _STATE_FILE).write_text(self._state())
        if self._must_save:
            self._must_save = False
            if self._run_dir is not None:
                self.exact.save()
        if not self._ends_here:
            if ends_epoch:
                self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    @property
    def _ends_here(self) -> bool:
        return self.exact.position.finished or self.state.global_step >= self.state.max_steps

    def _log_evaluate_save(self, result: StepResult) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss,
            result.gradient_norm,
            self.model,
            None,
            result.epoch,
            self._ignored,
            self._start_time,
            learning_rate=result.learning_rates[0],
        )

    def _follow_position(self) -> None:
        position, plan = self.exact.position, self._plan
        assert plan is not None
        done = min(position.batch * self.args.gradient_accumulation_steps, plan.parts)
        self.state.global_step, self.state.epoch = position.step, position.epoch + done / plan.parts

    def _follow_rank(self) -> None:
        """This worker may have become the one that reports: what reports is told that training begins."""
        if self.state.is_world_process_zero or self._rank():
            return
        self.state.is_world_process_zero = self.state.is_local_process_zero = True
        for callback in self.callback_handler.callbacks:
            if _is_transformers(type(callback)):
                callback.on_train_begin(self.args, self.state, self.control, model=self.model)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """*collective*. ``checkpoint-N`` with the weights, for others; that of unisono follows when all events are over."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.save_model(str(folder), _internal_call=True)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        self._must_save = True
        if self.args.should_save:
            self._describe_callbacks()
            self.state.save_to_json(str(folder / _STATE_FILE))
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights come from unisono's checkpoint, which is of the same step or a later one.

        Raises:
            ConfigurationError: It is not.
        """
        newest = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        run = self._run_dir
        if run is None or not Path(run, "checkpoints").is_dir() or newest is None:
            raise ConfigurationError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}, but there is no checkpoint of this run in {run}: one that "
                "another Trainer has written gives weights only. Load them with from_pretrained, and leave the argument out"
            )
        if Path(newest).resolve() != Path(resume_from_checkpoint).resolve():
            raise ConfigurationError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}, but the run goes on from its newest checkpoint, after "
                f"{newest}: pass True. To train from older weights, load them with from_pretrained and choose another output_dir"
            )

    def _exportable(self) -> list[Any]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]

    def _describe_callbacks(self) -> None:
        found: dict[str, Any] = {}
        for callback in [*self._exportable(), self.control]:
            found.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: states if len(states) > 1 else states[0] for name, states in found.items()}

    def _state(self) -> str:
        """What is the same on all workers: no times, and not whether this one reports."""
        state = {name: value for name, value in dataclasses.asdict(self.state).items() if not name.startswith("is_")}
        state["log_history"] = [{k: v for k, v in logs.items() if not k.endswith(_TIMES)} for logs in self.state.log_history]
        del state["stateful_callbacks"]
        kept = {
            "state": state,
            "control": dataclasses.asdict(self.control),
            "callbacks": [[type(one).__name__, one.state()["attributes"]] for one in self._exportable()],
            "losses": [self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged],
            "schedule": self.lr_scheduler.state_dict() if self._follows_metrics else None,
        }
        return json.dumps(kept)

    def _load_state(self, text: str) -> None:
        kept = json.loads(text)
        now = {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        # How long the run is, and who reports, is known here; what has happened, there.
        planned = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
        self.state = TrainerState(**{**now, **kept["state"], **{name: now[name] for name in planned}})
        self.control = TrainerControl(**kept["control"])
        for (name, attributes), callback in zip(kept["callbacks"], self._exportable(), strict=False):
            if name == type(callback).__name__:
                vars(callback).update(attributes)
        loss, self._total_loss_scalar, self._globalstep_last_logged = kept["losses"]
        self._tr_loss.fill_(loss)
        if self._follows_metrics:
            self.lr_scheduler.load_state_dict(kept["schedule"])

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """*collective*. What ``evaluate`` and ``predict`` call. The loss is the mean over all labels of the dataset."""
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self.callback_handler.eval_dataloader = dataloader
        main_input = getattr(self.model, "main_input_name", "input_ids")

        def outputs(model: Any, inputs: Any) -> dict[str, Any]:
            size, items = int(find_batch_size(inputs)), self._items(inputs)
            loss, logits, labels = self.prediction_step(model, inputs, loss_only, ignore_keys=ignore_keys)
            found: dict[str, Any] = {}
            if loss is not None:
                row = torch.tensor([float(loss) * items if items else 0.0, items], dtype=torch.float64) / size
                found["losses"] = row.repeat(size, 1)
            if "inputs" in self.args.include_for_metrics:
                found["inputs"] = inputs[main_input]
            if logits is not None:
                found["predictions"] = self.preprocess_logits_for_metrics(logits, labels) if self._preprocesses else logits
            if labels is not None:
                found["labels"] = labels
            return {name: _as_numpy_has_it(value) for name, value in found.items()}

        found = nested_numpify(
            self.exact.predict(
                dataloader.dataset, outputs, batch_size=self.args.eval_batch_size, loader=self._loader(dataloader), pad=-100
            )
        )
        predictions, labels, losses = found.get("predictions"), found.get("labels"), found.get("losses")
        metrics: dict[str, Any] = {}
        if self.compute_metrics is not None and predictions is not None and labels is not None:
            asked = {"inputs": found.get("inputs")} if "inputs" in self.args.include_for_metrics else {}
            if "loss" in self.args.include_for_metrics:
                asked["losses"] = losses[:, 0] / np.maximum(losses[:, 1], 1e-300)
            metrics = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels, **asked))
        metrics = denumpify_detensorize(metrics)
        if losses is not None:
            metrics["loss"] = float(losses[:, 0].sum() / losses[:, 1].sum())
        prefix = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=metrics, num_samples=len(dataloader.dataset))

    @property
    def _preprocesses(self) -> bool:
        return self.preprocess_logits_for_metrics is not None

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises:
        ConfigurationError: Always."""
        raise ConfigurationError("hyperparameter_search is not supported: start a run of its own for each setting")


Trainer = TransformersTrainer
"""The name that scripts import."""


class Seq2SeqTrainer(transformers.Seq2SeqTrainer, TransformersTrainer):  # type: ignore[misc]
    """``transformers.Seq2SeqTrainer``, likewise: with ``predict_with_generate``."""

    def __init__(self, *args: Any, unisono: Mapping[str, Any] | None = None, **others: Any) -> None:
        self._settings = dict(unisono or {})
        super().__init__(*args, **others)


class _Follower(Callback):
    """Tells transformers what happens in a run of unisono.

    Args:
        host: Is told.
    """

    def __init__(self, host: TransformersTrainer) -> None:
        self._host = host

    @property
    def edits_weights(self) -> bool:  # type: ignore[override]
        """transformers' own callbacks only look at the weights."""
        return not all(_is_transformers(type(one)) for one in self._host.callback_handler.callbacks)

    def on_begin(self, trainer: ExactTrainer) -> None:
        self._host._begin()

    def on_step(self, trainer: ExactTrainer, result: StepResult) -> None:
        self._host._end_step(result)

    def state_dict(self) -> dict[str, Any]:
        return {"transformers": self._host._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._host._load_state(state["transformers"])


def _is_transformers(thing: Any) -> bool:
    """Whether transformers itself defines it."""
    return str(thing.__module__).startswith("transformers.")


def _as_numpy_has_it(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_as_numpy_has_it(one) for one in value)
    if isinstance(value, Mapping):
        return {name: _as_numpy_has_it(one) for name, one in value.items()}
    return value.float() if value.dtype is torch.bfloat16 else value
