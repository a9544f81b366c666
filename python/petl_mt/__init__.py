"""The trainer ``petl-mt``: fine-tunes translation models with the kernels and layers of ``petl_kernels``.

Each line imports from the lines below it alone:

    cli                                         the program: finds a command, and turns errors into exit codes
    demo                                        the main job on text that the package makes itself
    study                                       several methods and budgets on one language pair
    commands, bench, doctor, methods, template  one file a command, and the flags that they share
    train, inference                            a run that is trained; a run that translates or is merged
    models                                      a model before training: loaded or new, with its method
    evaluate                                    validation loss and beam search
    loss, scores                                the loss of a batch; BLEU and chrF
    runs, data                                  a run on disk; text and batches
    checks, json_file, memory_meter, own_process, silence, terminal
    config
    config_file
"""
