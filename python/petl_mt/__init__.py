"""The trainer ``petl-mt``: fine-tunes translation models with the kernels and layers of ``petl_kernels``.

An arrow of imports points down only:

    cli                                    the program
    commands | study | demo | bench | doctor | methods     one command each
    train | inference                      a run that is trained | a run that translates
    models | evaluate                      a model before training | validation loss and beam search
    runs | data                            a run on disk | text and batches
    checks, config, scores, loss ...       single files that all of these use
"""
