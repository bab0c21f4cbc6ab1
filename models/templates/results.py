# %% [markdown]
# __BADGE__
#
# # Results: every model, and their vote
#
# Puts all trained models side by side, clean and attacked, and lets the hardened ones vote.
#
# - **Gives** a record in `checkpoints/Ensemble/`, figures in `assets/Ensemble/`.
# - **Needs** the files of `dataset/prepare_dataset.ipynb` and models that the `*_model.ipynb` and `*_model_atk.ipynb`
#   notebooks have trained and attacked, all on the same data.
# - **Takes** about twenty minutes for each vote on two CPU cores at 64 pixels with the patient split; a GPU is faster.
# - **Not for clinical use.** Research code; nothing here may inform a diagnosis.

__SETUP__

# %% [markdown]
# ## Parameters
#
# __INJECTED__

# %% tags=["parameters"]
models = []  # titles of the models that vote; [] takes every hardened one in checkpoints
rule = "soft"  # "soft", "hard" or "weighted": the vote whose figures are the ensemble's
epsilons = [0, 0.5 / 255, 1 / 255, 0.005, 2 / 255, 4 / 255, 8 / 255]  # radii to measure, pixels in [0, 1]
Epsilon = 2 / 255  # radius of the attacked examples
num_iter = 20  # PGD steps
seed = 0

# %% [markdown]
# All others, which may stay as they are.

# %% tags=["parameters", "hide-input"]
alphas = [0.0002, 0.0005, 0.001, 0.002]  # step sizes to show at Epsilon
max_test_images = 0  # 0 attacks all test images; else as many as the other notebooks did
attacked_rules = ["soft", "hard", "weighted"]  # votes that are attacked as one system, by all that is known of them
vote_suite = "quick"  # their budget: a key of SUITES in utils/attacks/suites.py
vote_images = 128  # on so many test images; 0 takes all
precision = "auto"  # "bf16": bfloat16 inside the models while attacking; "auto" where a GPU has it
panel_images = 64  # on so many the vote's gradients are checked for masking; 0 leaves that out
panel_queries = 500  # of the black-box attack in these checks
profile = "full"  # "quick" marks every figure as meaningless
second_dir = ""  # folder of a reproduction on another modality of the same patients, to fuse both by patient
out_dir = ""  # "" writes into this repository
data_dir = ""  # "" is dataset/dataset_variables

# %%
from utils import utils_funcs as uf

workspace = uf.Workspace.open(out_dir, profile=profile, data_dir=data_dir)
uf.check_suite(vote_suite)
assets = workspace.assets(uf.ENSEMBLE)
device = uf.pick_device()
splits = uf.load_splits(workspace.data_dir)
note = workspace.note(splits)
test = splits.test.balanced_subset(max_test_images) if max_test_images else splits.test
print(f"{splits.info['source']}, split by {splits.info['protocol']}, {len(test)} test images, on {device}. {note}")

# %% [markdown]
# ## Every model on its own
#
# From the records that the other notebooks wrote, in percent of the same test images. Robust accuracy counts an image
# only if it is right without attack and robust at every smaller radius too.

# %%
records = uf.trained_models(workspace)
titles = models or [title for title in records if title.endswith("_atk")]
print("vote:", ", ".join(titles))
uf.comparison_table(records)

# %% [markdown]
# The worst case over all attacks of their notebooks, with 95 % intervals over patients and the gradient checks that
# were passed.

# %%
uf.summary_table(uf.worst_cases(records))

# %% [markdown]
# What a network has to beat without any attack: baselines that look at the images without learning what
# a brain is. AUROC is by patient, Non against the rest.

# %%
baselines = {name: uf.report(logits, test) for name, logits in uf.baseline_answers(splits, test).items()}
uf.headline_table(uf.worst_cases(records), baselines)

# %% [markdown]
# ## The vote
#
# `soft` averages the members' probabilities, `hard` counts one vote a member, `weighted` averages with weights that
# make the right answers on the validation patients most likely. The rule that counts is a parameter, set before any of
# these scores is seen; the others stand beside it.

# %%
fits = {"classes": splits.classes, "fingerprint": splits.fingerprint}
members = {title: model.to(device) for title, model in uf.load_members(workspace, titles, **fits).items()}
weights = uf.validation_weights(list(members.values()), splits.validation, device=device)
votes = {
    name: uf.Vote(list(members.values()), rule=name, weights=weights if name == "weighted" else None).to(device)
    for name in uf.RULES
}
dict(zip(members, (round(weight, 3) for weight in weights)))

# %% [markdown]
# ## The vote under attack
#
# One attacked image for all members, made with the gradient of the vote itself. An image that fools one member only
# does not count.

# %%
attacks = [uf.Attack("fgsm"), uf.Attack("pgd", steps=num_iter, stop_when_fooled=True)]
cache = workspace.attack_cache  # finished batches: an interrupted evaluation goes on from there
options = {"epsilons": epsilons, "seed": seed, "device": device, "precision": precision, "cache": cache}
clean_scores, sweeps, worst_by_rule = {}, {}, {}
for name, vote in votes.items():
    sweeps[name] = {attack.title: uf.robustness_curve(vote, test, attack=attack, **options) for attack in attacks}
    clean_scores[name] = uf.evaluate(uf.predict(vote, test, device=device), test)

# %% [markdown]
# A hard vote has no gradient, and the mean of probabilities saturates. So the vote is also attacked through smooth
# stand-ins, from each member, and by its answers alone. An attacker who only transfers images from one member would
# find it more robust than it is.

# %%
few = test.balanced_subset(vote_images) if vote_images else test
checks = {"panel_images": panel_images, "panel_eps": Epsilon, "queries": panel_queries}
for name in {rule: None} | dict.fromkeys(attacked_rules):
    found = uf.evaluate_robustness(votes[name], few, suite=vote_suite, names=titles, **checks, **options)
    worst_by_rule[name] = found
    print(f"{name} vote, {len(few)} images, robust accuracy in percent")
    display(uf.vote_table(found))

# %%
uf.panel_table(worst_by_rule[rule])

# %%
rules = {
    name: uf.RuleScores(test=clean_scores[name], robustness=sweeps[name], worst_case=worst_by_rule.get(name))
    for name in votes
}
own = {title: records[title] for title in titles}
uf.save_vote(workspace, splits=splits, members=own, note=note, rule=rule, rules=rules, weights=weights)
record = uf.update_record(workspace.checkpoint(uf.ENSEMBLE), baselines=baselines)
uf.comparison_table(records | {f"{name} vote": found for name, found in rules.items()})

# %%
uf.score_table(record.test)

# %% [markdown]
# ## Figures

# %% [markdown]
# Rows are the true classes, columns the answers; what is right lies on the diagonal.

# %%
uf.show(record, "confusion_matrix", assets)

# %% [markdown]
# The share of test images that is still right at each radius: the vote under both attacks, its members, and the other
# rules.

# %%
uf.show(record, "robustness_curve", assets)

# %% [markdown]
# Images made to fool one member, shown to the others: `vote_images` of the test images.

# %%
pgd = attacks[-1]
accuracy = uf.transfer_matrix(members, few, eps=Epsilon, attack=pgd, seed=seed, device=device, cache=cache)
transfer = {"eps": Epsilon, "attack": pgd.title, "accuracy": accuracy}
record = uf.update_record(workspace.checkpoint(uf.ENSEMBLE), transfer=transfer)
uf.show(record, "transfer_matrix", assets)

# %% [markdown]
# The vote's worst case, how large a change each image takes, and whether the probabilities hold; then all models beside
# each other, and each attack alone.

# %%
worst = uf.worst_cases(records | {uf.ENSEMBLE: record})
display(*uf.show_all(uf.model_figures(uf.ENSEMBLE, worst), assets))

# %%
display(*uf.show_all(uf.comparison_figures(worst), workspace.assets("Robustness")))

# %% [markdown]
# How the members were hardened.

# %%
uf.show(record, "loss_curve", assets)

# %% [markdown]
# Accuracy of the same epochs on attacked validation images.

# %%
uf.show(record, "accuracy_curve", assets)

# %% [markdown]
# ## What it takes to fool the vote
#
# The same five slices at every radius, and at one radius with several step sizes.

# %%
vote = votes[rule]
names = {"classes": splits.classes, "model": f"{uf.ENSEMBLE}, {rule} vote", "note": note}
attacks = [(uf.Attack("fgsm"), eps) for eps in epsilons]
examples = uf.adversarial_examples(vote, test, attacks=attacks, device=device)
figure = uf.plot_adversarial_examples(epsilons, examples, attack_name="fgsm", parameter_type="Epsilon", **names)
uf.save_figure(figure, assets / "adversarial_examples_fgsm.png")
made = {"fgsm": uf.recipe(attacks, epsilons, "Epsilon")}
figure

# %%
attacks = [(uf.Attack("pgd", steps=num_iter, alpha=alpha), Epsilon) for alpha in alphas]
examples = uf.adversarial_examples(vote, test, attacks=attacks, device=device)
figure = uf.plot_adversarial_examples(alphas, examples, attack_name="pgd", parameter_type="Alpha", **names)
uf.save_figure(figure, assets / "adversarial_examples_pgd.png")
made["pgd"] = uf.recipe(attacks, alphas, "Alpha")
record = uf.update_record(workspace.checkpoint(uf.ENSEMBLE), examples=made)
figure

# %% [markdown]
# ## Grad-CAM of the members
#
# The same slices, seen by each member.

# %%
cams = uf.member_cams(members, test, device=device)
figure = uf.plot_grad_cam(cams, title=f"{uf.ENSEMBLE}: Grad-CAM of the members' own answers", note=note)
uf.save_figure(figure, assets / "grad_cam.png")
figure

# %% [markdown]
# ## A second modality
#
# Models of T1 and of FLAIR, say, each trained on its own images, answer together: the mean of what they say of a
# patient (late fusion). Nobody may be tested in one and trained on in the other.

# %%
uf.late_fusion(splits, votes[rule], second_dir, device=device)

# %% [markdown]
# ## Saved files

# %%
for folder in (workspace.checkpoint(uf.ENSEMBLE), assets):
    print(*sorted(f"{folder.parent.name}/{folder.name}/{path.name}" for path in folder.iterdir()), sep="\n")

# %% [markdown]
# ## What we found
#
# Every model and the vote beside baselines, which are not attacked; recall of each class before and after
# hardening, and the vote beside its best member, on the same images. AUROC is by patient, the healthy class against the
# rest.

# %%
print(*uf.robustness_findings(worst, baselines, Epsilon, note, test), sep="\n")
print(*uf.price_sentences(records | {uf.ENSEMBLE: record}), sep="\n")
uf.headline_table(worst, baselines)
