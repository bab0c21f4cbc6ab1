# %% [markdown]
# __BADGE__
#
# # Prepare the data
#
# Reads raw MRI slices, finds out which slices belong to the same patient, splits by patient, and saves
# `train_set.pt`, `validation_set.pt`, `test_set.pt` and `manifest.csv` for the model notebooks. It also measures
# how much the usual split gives away.
#
# - **Needs** nothing for phantoms (`source = "phantom"`), or the images: a folder of class folders, an archive of
#   one, or a Kaggle handle such as `lukechugh/best-alzheimer-mri-dataset-99-accuracy`.
# - **Takes** about one minute on two CPU cores for 11,519 images, seconds for phantoms.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__

# %% tags=["parameters"]
source = "phantom"  # a folder, an archive, a Kaggle handle, or "phantom"
split = "patient"  # "patient", "published" or "random"
ratios = [0.6, 0.2, 0.2]  # train, validation, test; for "published" use [0.8, 0.2, 0.0]
seed = 0
class_order = []  # all class names in the order of their labels; [] orders them by severity
size = 0  # store squares of this side; 0 keeps the native resolution
subjects = ""  # a CSV with the columns path and subject, where you know the patients
subject_pattern = ""  # a regular expression for the patient's id in the paths, for instance r"(P\d+)_"
synthetic = "auto"  # "corners": no black corners mean an augmented image; "none"; "auto" asks only the set made so
accept_unverified_patients = False  # split by patients that were guessed from pixels and failed the checks
profile = "full"  # "quick" marks every figure as meaningless
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)

# %% [markdown]
# ## Raw images
#
# Every file is decoded and checked; a damaged one stops here, by name.

# %%
raw = uf.load_source(source, size=size or None, classes=class_order or None)
assets = workspace.data_assets(raw.name)
print(f"{raw.name}: {len(raw)} images, {raw.pixels.shape[1]}x{raw.pixels.shape[2]} pixels, classes {raw.classes}")
print(f"figures go to assets/{assets.name}")

# %% [markdown]
# ## Patients
#
# From a table, from ids in the file names, or from one folder a patient, where there are such. Else from the pixels:
# neighbouring slices of one head correlate far more than any two heads do, so linking images above a threshold leaves
# one group a patient. Such groups must pass checks before they count as patients: plausible sizes, a gap between the
# weakest link inside and the strongest between, no head found again in another group, and a nearest neighbour that
# knows no more of other groups than their classes tell.

# %%
patients = uf.group_by_subject(raw, subjects or None, subject_pattern=subject_pattern or None, synthetic=synthetic)
print(uf.describe(raw, patients))

# %% [markdown]
# Six slices of one patient of each class, from the base upwards, in the order that was found.

# %%
pictures, captions = uf.slices_of_patients(raw, patients, columns=6)
sheet = uf.plot_contact_sheet(
    pictures, captions, columns=6, title=f"{raw.name}: one patient a class", note=uf.patients_note(patients)
)
uf.save_figure(sheet, assets / "contact_sheet.png")
sheet

# %% [markdown]
# ## Split

# %%
splits = uf.split_and_save(
    raw,
    patients,
    split=split,
    out=workspace.data_dir,
    ratios=tuple(ratios),
    seed=seed,
    accept_unverified=accept_unverified_patients,
)
note = workspace.note(splits)
print(note)
splits.table()

# %% [markdown]
# The first rows of the manifest. Group ids are numbers in the order of the paths; they point at nobody.

# %%
uf.load_manifest(workspace.data_dir / "manifest.csv").head()

# %% [markdown]
# ## Leak audit
#
# One-nearest-neighbour on raw pixels learns nothing about disease. Where patients are on both sides of a split it
# still scores high, because it finds the same head again; a split by patient takes that away. What the classes alone
# give is measured by a rule too simple to know anybody again: far above it, patients are on both sides.

# %%
found = uf.audit(raw, patients, seed=seed)
print(f"1-NN in patient-grouped five-fold: {found['cross_validation']:.1%}")
uf.audit_table(found["audits"])

# %%
uf.save_audit(found, assets, note=note)

# %% [markdown]
# The test slices, placed by how alike their pixels are, without any label. Where the lines on the right are short, a
# slice lies beside the others of the same person: whoever has seen one of them knows the next.

# %%
uf.save_embedding(splits.test, assets, note=note)

# %% [markdown]
# ## Saved files
#
# `models/resnet_model.ipynb` trains a classifier on them.

# %%
print(*sorted(path.name for path in [*workspace.data_dir.glob("*_set.pt"), *assets.iterdir()]), sep="\n")

# %% [markdown]
# ## What we found

# %%
print(*uf.leak_findings(found["audits"], note), sep="\n")
