"""How the recipes of the presets were chosen: for MAE, on held-out training images.

    python -m study.recipe data/cifar10 base lr-0.003 --minutes 10
    python -m study.recipe data/cifar10 --table

Each arm is a command line of train.py. All get the minutes' worth of computation of this machine:
what a step costs beside that of the first arm is measured in turns before, and an arm whose steps
cost more sees fewer images. A tenth of the training images is held out. On them the last decoder's
loss is measured (where targets and masks are the same), and a ridge classifier of the frozen mean
patch tokens that is fitted on the other nine tenths. Results go into study/recipe/ARM.json.
"""
