"""How experts of model libraries are recognised (`detect`) and run (`stacked`, `module_list`); facts about versions in `versions`."""
