# %% [markdown]
# __BADGE__
#
# # __TITLE__: attack and harden
#
# Attacks the classifier that `__NOTEBOOK___model.ipynb` trained, hardens it by adversarial training, and compares the
# two on the same images.
#
# - **Threat model** The attacker knows the model and all its weights, and may change every pixel of the grey image by
#   at most `Epsilon` (L-infinity, pixels in [0, 1]) to get any wrong answer. The attack changes the image itself, not
#   a resized or normalised copy.
# - **Gives** a hardened model in `checkpoints/__TITLE___atk/`, figures in `assets/__TITLE__/` and
#   `assets/__TITLE___atk/`.
# - **Needs** the files of `dataset/prepare_dataset.ipynb` and a model trained by `__NOTEBOOK___model.ipynb`.
# - **Takes** a few minutes an epoch on two CPU cores at 64 pixels with the patient split; a GPU is faster.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__

# %% tags=["parameters"]
BACKBONE = "__BACKBONE__"  # a key of BACKBONES in models/def_models.py
epsilons = [0, 0.5 / 255, 1 / 255, 0.005, 2 / 255, 4 / 255, 8 / 255]  # radii to measure, pixels in [0, 1]
Epsilon = 2 / 255  # radius for the step-size sweep and for hardening
num_iter = 20  # PGD steps when measuring
Alpha = 0.0  # step size when hardening; 0 is 2.5 * Epsilon / train_steps
recipe = "adversarial"  # "adversarial", "trades", "mart" or "n_fgsm"
adv_weight = 1.0  # of "adversarial": loss = (1 - adv_weight) * clean + adv_weight * attacked
num_epochs = 10
n_trials = 0  # Optuna trials of hardening; 0 searches nothing and keeps the values below
load_existing_hyperparams = False  # take those that the clean model's search has saved
load_existing_params = False  # load the hardened weights in checkpoints instead of hardening anew
seed = 0

# %% [markdown]
# All others, which may stay as they are.

# %% tags=["parameters", "hide-input"]
pretrained_model_path = ""  # folder of the clean model; "" is its folder in checkpoints
alphas = [0.0002, 0.0005, 0.001, 0.002]  # step sizes to compare at Epsilon
train_steps = 2  # PGD steps when hardening
beta = 0.0  # of "trades" and "mart": weight of the divergence; 0 is 6 and 5
curriculum = 0.0  # share of the training over which the PGD steps grow from 1 to train_steps
search_epochs = 3  # epochs a trial
search_space = []  # names out of SEARCH_SPACE and HARDENING_SPACE in utils/optuna_search.py; [] takes all of the first
clean_floor = 0.0  # least balanced accuracy without attack of a trial that may win
pareto = False  # search for accuracy with and without attack together
train_loaded_model = False  # harden the loaded weights further
batch_size = 64
trainable = "all"  # "all", "head", or a number: that many last blocks
learning_rate = __ATK_RATE__
augmentation_strength = 1.0
scanner = 0.0  # probability of each of bias field, Rician noise, motion and gain
slices_per_patient = 8  # random slices of each patient an epoch; 0 takes all
label_smoothing = 0.0
keep = "best"  # "best": the epoch with the best validation score; "last": where few patients make that score chance
sampling = "shuffled"  # "class" draws classes equally often, "patient" spreads patients over batches
freeze_batchnorm = False  # keep the clean model's BatchNorm statistics
ema_decay = 0.0  # of the averaged weights that are kept; 0 keeps the weights themselves
awp = 0.0  # size of the adversarial weight perturbation, 0.005 for instance
patience = 0  # stop after so many epochs without a better robust accuracy; 0 never stops
precision = "auto"  # "bf16": bfloat16 inside the model while training and attacking; "auto" where a GPU has it
validation_images = 512  # so many validation images are attacked after each epoch
max_test_images = 0  # 0 attacks all test images
panel_images = 128  # on so many of them the gradients are checked for masking; 0 leaves that out
panel_queries = 500  # of the black-box attack in these checks
profile = "full"  # "quick" marks every figure as meaningless
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from functools import partial

from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)
title = uf.BACKBONES[BACKBONE].title
hardened_title = f"{title}_atk"
checkpoint, assets = workspace.checkpoint(hardened_title), workspace.assets(hardened_title)
device = uf.pick_device()
radii = [255 * uf.check_eps(eps) for eps in (*epsilons, Epsilon)]
print(
    f"{title} on {device}; radii {', '.join(f'{eps:.3g}' for eps in radii[:-1])} / 255; hardened at {radii[-1]:.3g}/255"
)

# %% [markdown]
# ## Data

# %%
splits = uf.load_splits(workspace.data_dir)
note = workspace.note(splits)
test = splits.test.balanced_subset(max_test_images) if max_test_images else splits.test
print(f"{splits.info['source']}, split by {splits.info['protocol']}, {len(test)} test images. {note}")

# %% [markdown]
# ## The clean model
#
# Its accuracy must be the one in its record; if it is not, these are other weights or other data.

# %%
fits = {"backbone": BACKBONE, "classes": splits.classes, "fingerprint": splits.fingerprint}
pretrained = Path(pretrained_model_path) if pretrained_model_path else workspace.checkpoint(title)
model, record = uf.load_checkpoint(pretrained, **fits)
model.to(device)
metrics = uf.evaluate(uf.predict(model, test, device=device), test)
uf.check_against_record(metrics, record)
uf.score_table(metrics)

# %% [markdown]
# ## FGSM
#
# One step of full size. At each radius only images that were robust at all smaller ones are attacked again: a larger
# ball contains the smaller ones, so robust accuracy can only fall.

# %%
cache = workspace.attack_cache  # finished batches: an interrupted evaluation goes on from there
options = {"epsilons": epsilons, "seed": seed, "device": device, "precision": precision, "cache": cache}
before = {"FGSM": uf.robustness_curve(model, test, attack=uf.Attack("fgsm"), **options)}
uf.robustness_table(before)

# %% [markdown]
# ## PGD
#
# Many small steps, projected back into the ball, with a step size that reaches its edge. The first step that fools the
# model is enough.

# %%
pgd = uf.Attack("pgd", steps=num_iter, stop_when_fooled=True)
before[pgd.title] = uf.robustness_curve(model, test, attack=pgd, **options)
record = uf.update_record(pretrained, robustness=before)
uf.robustness_table(before)

# %% [markdown]
# The share of test images that is still right at each radius. The stronger attack has the lower line; below the dotted
# one, always naming the most frequent class does better.

# %%
uf.show(record, "robustness_curve", workspace.assets(title))

# %% [markdown]
# ## The number, and whether to believe it
#
# The worst case of each image over both attacks and a third: PGD on the margin between the right class and the next,
# which fools some that cross-entropy leaves. It meets only what the other two left. With 95 % intervals over patients,
# and with gradient checks, which a model fails that only hides its gradients: how many it passed, and which it failed,
# is said beside the number wherever it is shown. They say nothing of how good the classifier is. None of these
# attacks aims at a class, and targeted ones may fool more: what is shown here is an upper bound. `python -m utils
# robustness --suite standard` attacks with more.

# %%
margin = uf.Attack("pgd", steps=num_iter, loss="margin", stop_when_fooled=True)
checks = {"attacks": [uf.Attack("fgsm"), pgd, margin], "panel_images": panel_images, "panel_eps": Epsilon}
checks |= {"queries": panel_queries, "seed": seed, "device": device, "cache": cache}
worst = uf.robustness_curve(model, test, attack=margin, known=uf.combine(list(before.values())), **options)
record = uf.update_record(pretrained, worst_case=uf.judge(model, test, worst, **checks))
worst = uf.worst_cases({title: record})
uf.summary_table(worst)

# %%
uf.panel_table(worst[title])

# %% [markdown]
# The worst case with its interval, how large a change each image takes, and whether answers are right as often as the
# probabilities that come with them say.

# %%
display(*uf.show_all(uf.model_figures(title, worst), workspace.assets(title)))

# %% [markdown]
# ## What the attacked images look like
#
# The same five images at every radius, each beside its change. The model's answer changes; what a reader of the scan
# sees of the change, one can judge here.

# %%
attacks = [(uf.Attack("fgsm"), eps) for eps in epsilons]
examples = uf.adversarial_examples(model, test, attacks=attacks, device=device)
names = {"classes": splits.classes, "model": title, "note": note}
figure = uf.plot_adversarial_examples(epsilons, examples, attack_name="fgsm", parameter_type="Epsilon", **names)
uf.save_figure(figure, workspace.assets(title) / "adversarial_examples_fgsm.png")
made = {"fgsm": uf.recipe(attacks, epsilons, "Epsilon")}
figure

# %% [markdown]
# ## Step size
#
# PGD at the same `Epsilon` and number of steps with several step sizes, from the image itself. A step so small that
# `num_iter` of them do not reach the edge of the ball (a warning says so) makes the model look robust. It is not. The
# curve below is of a quarter of the test images, so its numbers differ from those above.

# %%
attacks = [(uf.Attack("pgd", steps=num_iter, alpha=alpha), Epsilon) for alpha in alphas]
examples = uf.adversarial_examples(model, test, attacks=attacks, device=device)
figure = uf.plot_adversarial_examples(alphas, examples, attack_name="pgd", parameter_type="Alpha", **names)
uf.save_figure(figure, workspace.assets(title) / "adversarial_examples_pgd.png")
made["pgd"] = uf.recipe(attacks, alphas, "Alpha")
record = uf.update_record(pretrained, examples=made)
figure

# %%
few = test.balanced_subset(len(test) // 4)
sweep = uf.step_size_sweep(model, few, eps=Epsilon, steps=num_iter, alphas=alphas, seed=seed, device=device)
record = uf.update_record(pretrained, step_size=sweep)
uf.show(record, "step_size", workspace.assets(title))

# %% [markdown]
# ## Explore
#
# One image at growing strength. With a running kernel, the second cell gives sliders.

# %%
strip = uf.attack_strip(model, test, 0, epsilons=epsilons, attack=pgd, note=note)
strip

# %%
uf.attack_explorer(model, test, note=note)

# %% [markdown]
# ## Adversarial training
#
# Every training image is attacked before each step, at a radius that grows from zero to `Epsilon`. The weights of the
# epoch with the best balanced accuracy under PGD-10 on validation patients are kept. Where the model becomes robust to
# the training's own attack alone (catastrophic overfitting), the best weights so far are taken back and the training
# goes on with more steps.
#
# Why this recipe: of five, trained on the real images over several seeds and chosen on validation patients alone
# (`benchmarks/recipes`, table in `assets/RESULTS.md`), training on attacked images only, `adversarial` with `adv_weight
# = 1`, was the most robust in the worst case. `n_fgsm` came within its spread with a single step, and is what to take
# where time is short. Keeping half of the loss on clean images, TRADES and MART were less robust at 2/255, and none of
# them was better without attack by more than the seeds differ. Of twelve changes to the winner two stood out on
# validation patients: CutMix costs eight points, and `sampling = "class"` trades ten points of accuracy for four of
# balanced accuracy under attack, though not on every seed, so it stays a choice. All this on a ResNet34 at 32 pixels;
# another backbone or size may order them otherwise, and `python -m utils recipes` tells. A transformer has to be
# trained as a whole (`trainable = "all"`): on a frozen DINOv2 encoder, hardening found only the answer that is always
# the same.

# %%
augmentation = uf.Augmentation(strength=augmentation_strength, scanner=scanner)
sizes = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
further = {"sampling": sampling, "ema_decay": ema_decay, "awp": awp, "patience": patience}
further |= {"augmentation": augmentation, "validation_images": validation_images}
further |= {"slices_per_patient": slices_per_patient, "label_smoothing": label_smoothing, "keep": keep}
further |= {"precision": precision, "seed": seed}
config = uf.TrainConfig(**sizes, **further)
attack = {"eps": Epsilon, "alpha": Alpha or None, "steps": train_steps, "curriculum": curriculum}
objective = uf.make_objective(recipe, **attack, adv_weight=adv_weight, beta=beta or None)
objective

# %% [markdown]
# Hyperparameters: those of the clean model's search, or of a search of their own that is scored on attacked validation
# patients, or the values above.

# %%
params = {}
if load_existing_hyperparams:
    params = uf.load_hyperparams(workspace.hyperparams(title))
    params.pop("trainable", None)  # how much of the clean model was trained says nothing about hardening
elif n_trials:
    start_model = partial(uf.load_trainable, pretrained, trainable=trainable, **fits)
    search = {"space": uf.pick_space(search_space), "num_epochs": search_epochs, "n_trials": n_trials}
    search |= {"objective": objective, "config": config, "seed": seed, "out": workspace.hyperparams(hardened_title)}
    search |= {"clean_floor": clean_floor, "pareto": pareto}
    params = uf.optuna_search(start_model, splits, **search)["params"]
    display(*uf.show_search(search["out"], hardened_title, assets, note=note))
config, objective = uf.apply_hyperparams(config, params), uf.apply_to_objective(objective, params)
config

# %%
uf.seed_everything(seed)
start = checkpoint if load_existing_params else pretrained
hardened = uf.load_trainable(start, trainable=params.get("trainable", trainable), **fits)
if freeze_batchnorm:
    hardened.freeze_batchnorm()
if not load_existing_params or train_loaded_model:
    run = {"config": config, "objective": objective}
    result = uf.train(hardened, splits, folder=checkpoint, on_epoch=uf.print_epoch, **run)
    save = {"splits": splits, "result": result, "start": f"checkpoints/{start.name}", "note": note}
    uf.save_trained(hardened, checkpoint, **save, **run)
else:
    uf.print_training(uf.read_record(checkpoint))
hardened_record = uf.read_record(checkpoint)

# %% [markdown]
# Training images are attacked, those of validation are not, so the two lines need not meet. The dotted line is the
# epoch whose weights are kept.

# %%
uf.show(hardened_record, "loss_curve", assets)

# %% [markdown]
# Where FGSM stays high and PGD falls, a model has learnt to resist only its own training's attack.

# %%
uf.show(hardened_record, "accuracy_curve", assets)

# %% [markdown]
# ## Before and after
#
# The same images and the same attacks, now against the hardened model.

# %%
hardened.to(device)
metrics = uf.evaluate(uf.predict(hardened, test, device=device), test)
after = {
    attack.title: uf.robustness_curve(hardened, test, attack=attack, **options) for attack in (uf.Attack("fgsm"), pgd)
}
hardened_record = uf.update_record(checkpoint, test=metrics, robustness=after)
both = {f"{title}, {name}": curve for name, curve in before.items()}
both |= {f"{hardened_title}, {name}": curve for name, curve in after.items()}
uf.robustness_table(both)

# %%
worst = uf.robustness_curve(hardened, test, attack=margin, known=uf.combine(list(after.values())), **options)
hardened_record = uf.update_record(checkpoint, worst_case=uf.judge(hardened, test, worst, **checks))
worst = uf.worst_cases({title: record, hardened_title: hardened_record})
uf.summary_table(worst)

# %% [markdown]
# The difference that hardening makes at each radius, with an interval over patients, and McNemar's test over images.

# %%
uf.paired_table(worst[hardened_title], worst[title], test)

# %%
uf.panel_table(worst[hardened_title])

# %% [markdown]
# What hardening is worth at a radius is the distance between a plain and a hardened line of the same attack.

# %%
uf.show(hardened_record, "robustness_curve", assets, base=record)

# %% [markdown]
# Plain and hardened beside each other: worst case, how large a change each image takes, recall of each class, and
# whether the probabilities hold.

# %%
display(*uf.show_all(uf.model_figures(hardened_title, worst), assets))

# %%
uf.score_table(metrics)

# %% [markdown]
# Rows are the true classes, columns the answers; what is right lies on the diagonal.

# %%
uf.show(hardened_record, "confusion_matrix", assets)

# %%
made = {}
for attack in (uf.Attack("fgsm"), pgd):
    attacks = [(attack, eps) for eps in epsilons]
    examples = uf.adversarial_examples(hardened, test, attacks=attacks, device=device)
    shown = names | {"model": f"{title}, hardened"}
    figure = uf.plot_adversarial_examples(epsilons, examples, attack.name, parameter_type="Epsilon", **shown)
    uf.save_figure(figure, assets / f"adversarial_examples_{attack.name}.png")
    made[attack.name] = uf.recipe(attacks, epsilons, "Epsilon")
figure

# %% [markdown]
# ## Grad-CAM, clean and attacked
#
# The same slices: the plain model's map without and under attack, and the hardened model's under attack. Each map is
# scaled to its own maximum.

# %%
cams = uf.hardening_cams(model, hardened, test, (pgd, Epsilon), device)
cam = uf.plot_grad_cam(cams, title=f"{hardened_title}: Grad-CAM of the model's own answer", note=note)
uf.save_figure(cam, assets / "grad_cam.png")
uf.update_record(checkpoint, examples=made, grad_cam_attack=uf.recipe([(pgd, Epsilon)])["attacks"][0])
cam

# %% [markdown]
# ## Saved files

# %%
for folder in (checkpoint, assets):
    print(*sorted(f"{folder.parent.name}/{folder.name}/{path.name}" for path in folder.iterdir()), sep="\n")

# %% [markdown]
# ## What we found
#
# The plain and the hardened model beside baselines, which are not attacked. AUROC is by patient, the healthy
# class against the rest.

# %%
baselines = {name: uf.report(logits, test) for name, logits in uf.baseline_answers(splits, test).items()}
print(*uf.robustness_findings(worst, baselines, Epsilon, note, test), *uf.price_sentences(worst), sep="\n")
uf.headline_table(worst, baselines)
