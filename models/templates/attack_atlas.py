# %% [markdown]
# __BADGE__
#
# # Attack atlas: one model in every way
#
# A model and its hardened twin under every kind of attack, and on scans that go wrong by themselves, on the same
# patients. Each chapter asks one question; its numbers lie in a file of their own.
#
# - **Gives** records and figures in `assets/Atlas/`.
# - **Needs** the files of `dataset/prepare_dataset.ipynb` and two models in `checkpoints/`.
# - **Takes** an hour and a half on one idle CPU core at 64 pixels; a chapter that was measured before is only read.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__
#
# What `assets/Atlas/` holds of these two models is only read; `records` must be another folder for models of your own.

# %% tags=["parameters"]
model_name = "EfficientNetB0"  # a folder in checkpoints/, or the path of one
hardened_name = "EfficientNetB0_atk"  # its hardened twin
records = ""  # folder of the chapters; "" is assets/Atlas
fold = -1  # of "python -m utils folds", where the models come from there; -1 is the prepared split
seed = 0
profile = "full"  # "quick" spends so little that the numbers mean nothing
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)
splits = uf.atlas_splits(workspace, fold=fold)
models = uf.atlas_models(workspace, model_name, hardened_name, splits)
bench = uf.open_bench(
    models,
    splits,
    budget=uf.atlas_budget(profile),
    seed=seed,
    device=uf.pick_device(),
    cache=workspace.attack_cache,  # from which a killed chapter goes on
)
atlas = uf.Atlas(bench, records or workspace.assets(uf.ATLAS), note=workspace.note(splits))
print(atlas)

# %% [markdown]
# ## Scans that go wrong by themselves
#
# Before anybody attacks: a coil that is brighter on one side, a head that moved, noise, a bad skull strip. One slice of
# a test patient at five severities.

# %%
atlas.sheet()

# %% [markdown]
# How to read it: left the share of patients that are decided wrongly, ill and healthy counting alike; right by how much
# the two models differ. Where a bar crosses 0, it cannot be told whether hardening helps.

# %%
atlas.show("scans")

# %%
atlas.table("scans")

# %% [markdown]
# A scan can also be chosen: of many plausible ones the worst for this patient.

# %%
atlas.table("worst_scan")

# %% [markdown]
# ## Which way answers are turned
#
# To hide an illness and to invent one are different harms. The slices of a patient are attacked together, and the
# patient's verdict is the target.
#
# How to read it: of the patients that are found right without attack, the share that is turned within each radius.

# %%
atlas.show("directions")

# %%
atlas.table("directions")

# %% [markdown]
# And each class into each other one, slice by slice: rows are what a slice is, columns what the attacker wants.

# %%
atlas.show("reached")

# %%
atlas.table("asked")

# %% [markdown]
# ## The patient as target
#
# An attacker may be free in each slice, or have to change neighbouring slices alike, as a real cause would.
#
# How to read it: the further right a curve rises, the more the verdicts bear. Each radius is an upper bound.

# %%
atlas.show("patients")

# %%
atlas.table("patients")

# %% [markdown]
# ## One change for everybody
#
# Fitted on slices of training patients, added to slices of patients it has never seen.

# %%
atlas.show("universal")

# %%
atlas.table("universal")

# %% [markdown]
# ## How much of a slice it takes
#
# How to read it: each curve is an attack that may change nothing outside a part. None can be above the whole image.

# %%
atlas.show("regions")

# %%
atlas.table("regions")

# %% [markdown]
# The smallest part that alone changes an answer: pixels are ranked by one attack on the whole slice, and the share is
# halved as long as it suffices.

# %%
atlas.show("sufficient_regions")

# %% [markdown]
# ## What survives saving and viewing
#
# An attacked slice is saved in 8 bits, compressed, windowed, resized, turned by a degree. PGD does not expect that;
# PGD on the expectation over such views does.

# %%
atlas.show("survival")

# %%
atlas.table("survival")

# %% [markdown]
# ## Images that the model does not know
#
# Detectors tell noise, clouds, upside-down slices and drawn heads from real slices, until they are attacked themselves.
#
# How to read it: green is the detector as it is published, orange the same detector under attack, dotted is chance.

# %%
atlas.show("detectors")

# %%
atlas.table("foreign")

# %% [markdown]
# The other way round: real slices that are misclassified and still accepted, by somebody who knows the detector.

# %%
atlas.show("detectors_fooled")

# %%
atlas.table("fooled")

# %% [markdown]
# ## A bracket for each patient
#
# From below what is certain, by randomised smoothing; from above what an attack found. The truth lies between.

# %%
atlas.show("brackets")

# %%
atlas.table("bracket")

# %% [markdown]
# ## The vote
#
# Three hardened networks answer together, and one attacked slice must turn their common answer. The re-weighted attack
# pulls most at the members that are still right. These are the models in `checkpoints/`, which vote in
# `results.ipynb`.
#
# How to read it: each row is one attack alone, the worst case is all of them, and the last row says by how many points
# the re-weighted attack lowers it.

# %%
uf.attacked_vote(workspace)

# %% [markdown]
# ## Every attack by its name
#
# Ours and those of torchattacks, each alone on the same slices, and what a slice costs.

# %%
atlas.show("names")

# %%
atlas.table("names")

# %% [markdown]
# ## What we found

# %%
atlas.table("learnt")

# %%
atlas.table("costs")
