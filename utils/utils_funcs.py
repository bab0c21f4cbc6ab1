"""The one import of every notebook. No logic lives here: each name is defined in the module it comes from."""

from models.def_models import BACKBONES, build_model, default_size
from utils.attacks.attack import Attack
from utils.attacks.gradient import fgsm, pgd
from utils.attacks.suites import check_suite
from utils.core.radii import check_eps
from utils.core.reproducibility import seed_everything
from utils.data.cases import Reading, example_scan, read_cases
from utils.data.preparation import (
    describe,
    group_by_subject,
    patients_note,
    prepare_dataset,
    slices_of_patients,
    split_and_save,
)
from utils.data.scans.standard import Stripping
from utils.data.sets import load_manifest, load_splits
from utils.data.sources import load_source
from utils.data.workspace import Workspace, pick_device
from utils.evaluation.baselines import baseline_answers
from utils.evaluation.curve import combine
from utils.evaluation.ensemble import RULES, Vote, validation_weights
from utils.evaluation.examples import adversarial_examples
from utils.evaluation.intervals import report
from utils.evaluation.leak_audit import audit, audit_table
from utils.evaluation.metrics import evaluate, predict
from utils.evaluation.robustness import evaluate_robustness, judge
from utils.evaluation.transfer import step_size_sweep, transfer_matrix
from utils.evaluation.worst_case import robustness_curve
from utils.experiments.atlas.bench import open_bench
from utils.experiments.fit import fit
from utils.experiments.modalities import late_fusion
from utils.experiments.prediction import Predictor, answer_case
from utils.experiments.records import (
    ENSEMBLE,
    check_against_record,
    comparison_table,
    load_members,
    parameter_table,
    robustness_table,
    save_trained,
    save_vote,
    score_table,
    trained_models,
    update_record,
)
from utils.experiments.search_space import apply_hyperparams, apply_to_objective, pick_space
from utils.grad_cam import explain_rows, grad_cam
from utils.optuna_search import load_hyperparams, optuna_search
from utils.reporting.answers import answers_found, answers_table, plot_answer, told
from utils.reporting.atlas import ATLAS, Atlas, atlas_budget, atlas_models, atlas_splits, attacked_vote
from utils.reporting.embedding import save_embedding
from utils.reporting.figures import hardening_cams, member_cams, recipe, show, show_search
from utils.reporting.findings import leak_findings, robustness_findings, training_findings
from utils.reporting.leak import save_audit
from utils.reporting.price import price_sentences
from utils.reporting.robustness_figures import (
    comparison_figures,
    headline_table,
    model_figures,
    paired_table,
    panel_table,
    show_all,
    summary_table,
    vote_table,
    worst_cases,
)
from utils.reporting.slices import plot_adversarial_examples, plot_contact_sheet, plot_grad_cam
from utils.reporting.style import save_figure
from utils.reporting.widgets import answer_explorer, attack_explorer, attack_strip
from utils.training.augment import Augmentation
from utils.training.checkpoints import load_checkpoint, load_trainable, read_record, save_checkpoint
from utils.training.config import TrainConfig
from utils.training.loop import print_epoch, print_training, train
from utils.training.objectives import make_objective
from utils.training.record import RuleScores

__all__ = [
    "ATLAS",
    "BACKBONES",
    "ENSEMBLE",
    "RULES",
    "Atlas",
    "Attack",
    "Augmentation",
    "Predictor",
    "Reading",
    "RuleScores",
    "Stripping",
    "TrainConfig",
    "Vote",
    "Workspace",
    "adversarial_examples",
    "answer_case",
    "answer_explorer",
    "answers_found",
    "answers_table",
    "apply_hyperparams",
    "apply_to_objective",
    "atlas_budget",
    "atlas_models",
    "atlas_splits",
    "attack_explorer",
    "attack_strip",
    "attacked_vote",
    "audit",
    "audit_table",
    "baseline_answers",
    "build_model",
    "check_against_record",
    "check_eps",
    "check_suite",
    "combine",
    "comparison_figures",
    "comparison_table",
    "default_size",
    "describe",
    "evaluate",
    "evaluate_robustness",
    "example_scan",
    "explain_rows",
    "fgsm",
    "fit",
    "grad_cam",
    "group_by_subject",
    "hardening_cams",
    "headline_table",
    "judge",
    "late_fusion",
    "leak_findings",
    "load_checkpoint",
    "load_hyperparams",
    "load_manifest",
    "load_members",
    "load_source",
    "load_splits",
    "load_trainable",
    "make_objective",
    "member_cams",
    "model_figures",
    "open_bench",
    "optuna_search",
    "paired_table",
    "panel_table",
    "parameter_table",
    "patients_note",
    "pgd",
    "pick_device",
    "pick_space",
    "plot_adversarial_examples",
    "plot_answer",
    "plot_contact_sheet",
    "plot_grad_cam",
    "predict",
    "prepare_dataset",
    "price_sentences",
    "print_epoch",
    "print_training",
    "read_cases",
    "read_record",
    "recipe",
    "report",
    "robustness_curve",
    "robustness_findings",
    "robustness_table",
    "save_audit",
    "save_checkpoint",
    "save_embedding",
    "save_figure",
    "save_trained",
    "save_vote",
    "score_table",
    "seed_everything",
    "show",
    "show_all",
    "show_search",
    "slices_of_patients",
    "split_and_save",
    "step_size_sweep",
    "summary_table",
    "told",
    "train",
    "trained_models",
    "training_findings",
    "transfer_matrix",
    "update_record",
    "validation_weights",
    "vote_table",
    "worst_cases",
]
