# %% [markdown]
# # __TITLE__: train and evaluate
#
# Trains a four-stage dementia classifier on MRI slices and measures it on patients it has never seen.
#
# - **Gives** weights and a record in `checkpoints/__TITLE__/`, figures in `assets/__TITLE__/`.
# - **Needs** the files that `dataset/prepare_dataset.ipynb` saves.
# - **Takes** __MINUTES__
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

# %% [markdown]
# ## Setup

# %%
import sys
from functools import partial
from pathlib import Path

HERE = Path.cwd()
ROOT = next((d for d in (HERE, *HERE.parents) if (d / "models" / "def_models.py").is_file()), None)
if ROOT is None:
    raise FileNotFoundError("open this notebook from inside a clone of the repository")
sys.path.insert(0, str(ROOT))

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
BACKBONE = "__BACKBONE__"  # a key of BACKBONES in models/def_models.py
weights = "scratch"  # "scratch", "pretrained" (downloads ImageNet weights), or a path
trainable = "all"  # "all", "head", or a number: that many last blocks
image_size = 224
load_existing_hyperparams = False  # read checkpoints/optuna_params instead of searching
n_trials = 0  # Optuna trials; 0 keeps the defaults of TrainConfig
search_epochs = 3
load_existing_params = False  # load the weights in checkpoints instead of starting anew
train_loaded_model = False  # train the loaded weights further
num_epochs = 20
batch_size = 64
learning_rate = 0.001
augmentation_strength = 1.0  # 0 turns augmentation off
max_test_images = 0  # 0 evaluates all test images
seed = 0
profile = "full"  # "quick" marks every figure as meaningless
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)
title = uf.BACKBONES[BACKBONE].title
checkpoint, assets = workspace.checkpoint(title), workspace.assets(title)
device = uf.pick_device()
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
# layers with `trainable` above, or set `requires_grad` here yourself.

# %%
classes, options = splits.classes, {"image_size": image_size, "weights": weights, "trainable": trainable}
new_model = partial(uf.build_model, BACKBONE, num_classes=len(classes), **options)
uf.seed_everything(seed)
if load_existing_params:
    model, record = uf.load_checkpoint(checkpoint, classes=classes, fingerprint=splits.fingerprint)
    model.freeze(trainable)
else:
    model = new_model()
uf.parameter_table(model)

# %% [markdown]
# ## Hyperparameters
#
# Either the ones a search has saved, or a new Optuna search on the validation patients, or the defaults.

# %%
augmentation = uf.Augmentation(strength=augmentation_strength)
sizes = {"num_epochs": num_epochs, "batch_size": batch_size, "learning_rate": learning_rate}
config = uf.TrainConfig(**sizes, seed=seed, augmentation=augmentation)
params = {}
if load_existing_hyperparams:
    params = uf.load_hyperparams(workspace.hyperparams(title))
elif n_trials:
    search = {"num_epochs": search_epochs, "n_trials": n_trials, "config": config, "seed": seed}
    params = uf.optuna_search(new_model, splits, out=workspace.hyperparams(title), **search)["params"]
config = uf.apply_hyperparams(config, params)
config

# %% [markdown]
# ## Train
#
# The weights of the epoch with the best balanced accuracy on the validation patients are kept. A run that was
# interrupted goes on where it stopped when this cell is run again.

# %%
if not load_existing_params or train_loaded_model:
    result = uf.train(model, splits, config=config, folder=checkpoint, on_epoch=uf.print_epoch)
    start = f"checkpoints/{title}" if load_existing_params else weights
    record = uf.save_trained(model, checkpoint, splits=splits, result=result, config=config, start=start, note=note)
training = record["training"]
print(f"kept epoch {training['best_epoch'] + 1} of {len(training['history'])}, {training['seconds'] / 60:.1f} minutes")

# %%
curves = {"title": f"{title}: training", "best_epoch": training["best_epoch"], "note": note}
loss_curve = uf.plot_loss_curve(training["history"], **curves)
uf.save_figure(loss_curve, assets / "loss_curve.png")
loss_curve

# %%
accuracy_curve = uf.plot_accuracy_curve(training["history"], **curves)
uf.save_figure(accuracy_curve, assets / "accuracy_curve.png")
accuracy_curve

# %% [markdown]
# ## Evaluate
#
# On the test images, once by image and once by patient (mean probability over a patient's slices). Scores are means
# over the classes that the test set contains. With two Moderate patients in the real data, one trains and one tests:
# nothing can be concluded about that class.

# %%
model.to(device)
test = splits.test.balanced_subset(max_test_images) if max_test_images else splits.test
metrics = uf.evaluate(uf.predict(model, test, device=device), test)
record = uf.update_record(checkpoint, test=metrics)
uf.score_table(metrics)

# %%
matrix = metrics["image"]["confusion"]
confusion_matrix = uf.plot_confusion_matrix(matrix, splits.classes, title=f"{title}: test images", note=note)
uf.save_figure(confusion_matrix, assets / "confusion_matrix.png")
confusion_matrix

# %% [markdown]
# ## Grad-CAM
#
# Which parts of the slice the answer hangs on.

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
# ## Next
#
# `models/__NOTEBOOK___model_atk.ipynb` attacks this model and hardens it.
