# %% [markdown]
# __BADGE__
#
# # __TITLE__: train and evaluate
#
# Trains a four-stage dementia classifier on MRI slices and measures it on patients it has never seen.
#
# - **Gives** weights and a record in `checkpoints/__TITLE__/`, figures in `assets/__TITLE__/`.
# - **Needs** the files that `dataset/prepare_dataset.ipynb` saves.
# - **Takes** a few minutes an epoch on two CPU cores at 64 pixels with the patient split; a GPU is faster.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__

# %% tags=["parameters"]
BACKBONE = "__BACKBONE__"  # a key of BACKBONES in models/def_models.py
weights = "pretrained"  # "pretrained" (downloads the published weights), "scratch", or a path
image_size = 0  # 0: 128 pixels on a CPU (126 for DINOv2), 224 on a GPU
num_epochs = 20
batch_size = 64
learning_rate = __RATE__
n_trials = 0  # Optuna trials; 0 searches nothing and keeps the values below
load_existing_hyperparams = False  # read checkpoints/optuna_params instead of searching
load_existing_params = False  # load the weights in checkpoints instead of starting anew
seed = 0

# %% [markdown]
# All others, which may stay as they are.

# %% tags=["parameters", "hide-input"]
trainable = "all"  # "all", "head", or a number: that many last blocks
search_epochs = 3  # epochs a trial
search_space = []  # names out of SEARCH_SPACE in utils/optuna_search.py; [] takes all of them
train_loaded_model = False  # train the loaded weights further
augmentation_strength = 1.0  # 0 turns augmentation off
scanner = 0.0  # probability of each of bias field, Rician noise, motion and gain
slices_per_patient = 8  # random slices of each patient an epoch; 0 takes all
label_smoothing = 0.0
keep = "best"  # "best": the epoch with the best validation score; "last": where few patients make that score chance
sampling = "shuffled"  # "class" draws classes equally often, "patient" spreads patients over batches
mixup = 0.0  # parameter of the Beta distribution, 0.2 for instance; 0 mixes nothing
layer_decay = 1.0  # factor on the learning rate from each block to the one before it
patience = 0  # stop after so many epochs without a better validation score; 0 never stops
precision = "auto"  # "bf16": bfloat16 inside the model while training; "auto" takes it on a GPU that has it
max_test_images = 0  # 0 evaluates all test images
profile = "full"  # "quick" marks every figure as meaningless
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from functools import partial

from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)
title = uf.BACKBONES[BACKBONE].title
checkpoint, assets = workspace.checkpoint(title), workspace.assets(title)
device = uf.pick_device()
image_size = image_size or uf.default_size(BACKBONE, device)
print(f"{title} on {device}; {num_epochs} epochs of batches of {batch_size}, {image_size} pixels, seed {seed}")

# %% [markdown]
# ## Data

# %%
splits = uf.load_splits(workspace.data_dir)
note = workspace.note(splits)
print(f"{splits.info['source']}, split by {splits.info['protocol']}. {note}")
splits.table()

# %% [markdown]
# ## Model
#
# Images come in as grey pixels in [0, 1]; resizing to `image_size` and normalising happen inside the model. Freeze
# layers with `trainable` above, or set `requires_grad = False` here yourself.
#
# Published weights are the start unless `weights` says otherwise. A convolutional network can learn this task from
# scratch, too. A vision transformer such as DINOv2 cannot do it well: it must first learn from many images what
# convolutions have built in, that neighbouring pixels belong together.

# %%
classes, options = splits.classes, {"image_size": image_size, "weights": weights, "trainable": trainable}
new_model = partial(uf.build_model, BACKBONE, num_classes=len(classes), **options)
uf.seed_everything(seed)
if load_existing_params:
    fits = {"backbone": BACKBONE, "classes": classes, "fingerprint": splits.fingerprint}
    model, record = uf.load_checkpoint(checkpoint, **fits)
else:
    model = new_model()
uf.parameter_table(model)

# %% [markdown]
# ## Hyperparameters
#
# Either the ones that a search has saved, or a new Optuna search that is scored on the validation patients, or the
# values above.

# %%
augmentation = uf.Augmentation(strength=augmentation_strength, scanner=scanner)
sizes = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
further = {"sampling": sampling, "mixup": mixup, "layer_decay": layer_decay, "patience": patience}
further |= {"slices_per_patient": slices_per_patient, "label_smoothing": label_smoothing, "keep": keep}
further |= {"precision": precision, "seed": seed, "augmentation": augmentation}
config = uf.TrainConfig(**sizes, **further)

# %%
found_in = workspace.hyperparams(title)
params = {}
if load_existing_hyperparams:
    params = uf.load_hyperparams(found_in)
elif n_trials:
    space = uf.pick_space(search_space, freezing=weights != "scratch")
    search = {"space": space, "num_epochs": search_epochs, "n_trials": n_trials, "out": found_in}
    params = uf.optuna_search(new_model, splits, config=config, seed=seed, **search)["params"]
config = uf.apply_hyperparams(config, params)
config

# %%
display(*uf.show_search(found_in, title, assets, note=note) if params else "")

# %% [markdown]
# ## Train
#
# The weights of the epoch with the best balanced accuracy on the validation patients are kept. A run that was
# interrupted goes on where it stopped when this cell is run again.

# %%
model.freeze(params.get("trainable", trainable))
if not load_existing_params or train_loaded_model:
    result = uf.train(model, splits, config=config, folder=checkpoint, on_epoch=uf.print_epoch)
    start = f"checkpoints/{title}" if load_existing_params else weights
    record = uf.save_trained(model, checkpoint, splits=splits, result=result, config=config, start=start, note=note)
else:
    uf.print_training(record)
training = record.training
print(f"kept epoch {training.best_epoch + 1} of {len(training.history)}, {training.seconds / 60:.1f} minutes")

# %% [markdown]
# Where the loss of training patients still falls and that of validation patients no longer does, the network learns its
# patients by heart. The dotted line is the epoch whose weights are kept.

# %%
uf.show(record, "loss_curve", assets)

# %% [markdown]
# The same epochs in accuracy. Balanced accuracy counts each class alike, so that naming the most frequent one does not
# pay.

# %%
uf.show(record, "accuracy_curve", assets)

# %% [markdown]
# ## Evaluate
#
# On the test images, once by image and once by patient (mean probability over a patient's slices). Scores are means
# over the classes that the test set contains. With two Moderate patients in the real data, one trains and one tests:
# nothing can be concluded about that class.

# %%
model.to(device)
test = splits.test.balanced_subset(max_test_images) if max_test_images else splits.test
answers = uf.predict(model, test, device=device)
metrics = uf.evaluate(answers, test)
record = uf.update_record(checkpoint, test=metrics)
uf.score_table(metrics)

# %% [markdown]
# Rows are the true classes, columns the answers; what is right lies on the diagonal.

# %%
uf.show(record, "confusion_matrix", assets)

# %% [markdown]
# ## Grad-CAM
#
# Which parts of the slice the answer hangs on. Each map is scaled to its own maximum: colours compare places within a
# map, not maps.

# %%
rows = uf.explain_rows(model, test, n=5, device=device)
cam = uf.plot_grad_cam(rows, title=f"{title}: Grad-CAM of the model's own answer", note=note)
uf.save_figure(cam, assets / "grad_cam.png")
cam

# %% [markdown]
# ## Saved files

# %%
for folder in (checkpoint, assets):
    print(*sorted(f"{folder.parent.name}/{folder.name}/{path.name}" for path in folder.iterdir()), sep="\n")

# %% [markdown]
# ## What we found
#
# Beside it baselines, which look at the same images without learning what a brain is, or not at all. AUROC is by
# patient, the healthy class against the rest. What attacks leave of this model is measured in
# `models/__NOTEBOOK___model_atk.ipynb`, which hardens it, too.

# %%
baselines = {name: uf.report(logits, test) for name, logits in uf.baseline_answers(splits, test).items()}
scores = uf.report(answers, test)
print(*uf.training_findings(title, scores, baselines, note), sep="\n")
uf.headline_table({}, {title: scores} | baselines)
