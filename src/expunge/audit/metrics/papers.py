"""Where the metrics and attacks come from."""

from __future__ import annotations

from expunge.engine.parts import Paper

TOFU = Paper(
    "TOFU: A Task of Fictitious Unlearning for LLMs", "Maini, Feng, Schwarzschild, Lipton and Kolter", 2024,
    "https://arxiv.org/abs/2401.06121",
)  # fmt: skip
MUSE = Paper(
    "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", "Shi, Lee, Huang et al.", 2024,
    "https://arxiv.org/abs/2407.06460",
)  # fmt: skip
EXTRACTION = Paper(
    "Quantifying Memorization Across Neural Language Models", "Carlini, Ippolito, Jagielski et al.", 2022,
    "https://arxiv.org/abs/2202.07646",
)  # fmt: skip
OPEN_UNLEARNING = Paper(
    "OpenUnlearning: Accelerating LLM Unlearning via Unified Benchmarking of Methods and Metrics", "Dorna, Mekala, Zhao et al.",
    2025, "https://arxiv.org/abs/2506.12618",
)  # fmt: skip
EXACT = Paper(
    "Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models", "Tirumala et al.", 2022,
    "https://arxiv.org/abs/2205.10770",
)  # fmt: skip
LOSS = Paper(
    "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", "Yeom, Giacomelli, Fredrikson and Jha", 2018,
    "https://arxiv.org/abs/1709.01604",
)  # fmt: skip
CARLINI = Paper(
    "Extracting Training Data from Large Language Models", "Carlini, Tramer, Wallace et al.", 2021,
    "https://arxiv.org/abs/2012.07805",
)  # fmt: skip
MIN_K = Paper(
    "Detecting Pretraining Data from Large Language Models", "Shi, Ajith, Xia et al.", 2023, "https://arxiv.org/abs/2310.16789"
)
MIN_K_PLUS_PLUS = Paper(
    "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models", "Zhang, Sun, Yeats et al.", 2024,
    "https://arxiv.org/abs/2404.02936",
)  # fmt: skip
GRADIENT = Paper(
    "White-box vs Black-box: Bayes Optimal Strategies for Membership Inference", "Sablayrolles, Douze, Ollivier et al.", 2019,
    "https://arxiv.org/abs/1908.11229",
)  # fmt: skip
DEGENERATION = Paper(
    "The Curious Case of Neural Text Degeneration",
    "Holtzman, Buys, Du, Forbes and Choi",
    2019,
    "https://arxiv.org/abs/1904.09751",
)
RWKU = Paper(
    "RWKU: Benchmarking Real-World Knowledge Unlearning for Large Language Models", "Jin, Cao, Wang et al.", 2024,
    "https://arxiv.org/abs/2406.10890",
)  # fmt: skip
JAILBREAK = Paper(
    "Jailbroken: How Does LLM Safety Training Fail?", "Wei, Haghtalab and Steinhardt", 2023, "https://arxiv.org/abs/2307.02483"
)
ORT = Paper("LLM Unlearning Should Be Form-Independent", "Ye, Zhang and Wu", 2025, "https://arxiv.org/abs/2506.07795")
LEAK = Paper(
    "Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding", "Reisizadeh, Ruan, Chen et al.", 2025,
    "https://arxiv.org/abs/2511.04934",
)  # fmt: skip
SLEEK = Paper(
    "Step-by-Step Reasoning Attack: Revealing 'Erased' Knowledge in Large Language Models",
    "Sinha, Baser, Mandal, Divakaran and Kankanhalli", 2025, "https://arxiv.org/abs/2506.17279",
)  # fmt: skip
MIRAGE = Paper(
    "The Unlearning Mirage: A Dynamic Framework for Evaluating LLM Unlearning", "Shah, Huang, Murugesan, Baracaldo and Yang",
    2026, "https://arxiv.org/abs/2603.11266",
)  # fmt: skip
UNPACT = Paper(
    "Understanding the Dilemma of Unlearning for Large Language Models", "Zhang, Qian, Huang et al.", 2025,
    "https://arxiv.org/abs/2509.24675",
)  # fmt: skip
UNUNLEARNING = Paper(
    "UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
    "Shumailov, Hayes, Triantafillou et al.", 2024, "https://arxiv.org/abs/2407.00106",
)  # fmt: skip
GHOST = Paper(
    "Protecting Copyrighted Material with Unique Identifiers in Large Language Model Training", "Zhao, Zhu, Quan and Yang", 2024,
    "https://arxiv.org/abs/2403.15740",
)  # fmt: skip
UTF = Paper(
    "Hiding Text in Large Language Models: Introducing Unconditional Token Forcing Confusion",
    "Hoscilowicz, Popiolek, Rudkowski, Bieniasz and Janicki", 2024, "https://arxiv.org/abs/2406.02481",
)  # fmt: skip
WMDP = Paper(
    "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", "Li, Pan, Gopal et al.", 2024,
    "https://arxiv.org/abs/2403.03218",
)  # fmt: skip
MMLU = Paper(
    "Measuring Massive Multitask Language Understanding",
    "Hendrycks, Burns, Basart et al.",
    2020,
    "https://arxiv.org/abs/2009.03300",
)
TRUTHFUL = Paper(
    "TruthfulQA: Measuring How Models Mimic Human Falsehoods", "Lin, Hilton and Evans", 2021, "https://arxiv.org/abs/2109.07958"
)
SPARSE = Paper("Model Sparsity Can Simplify Machine Unlearning", "Jia, Liu, Ram et al.", 2023, "https://arxiv.org/abs/2304.04934")
BLINDSPOT = Paper(
    "Deep Regression Unlearning", "Tarun, Chundawat, Mandal and Kankanhalli", 2022, "https://arxiv.org/abs/2210.08196"
)
LIRA = Paper(
    "Membership Inference Attacks From First Principles", "Carlini, Chien, Nasr et al.", 2021, "https://arxiv.org/abs/2112.03570"
)
RMIA = Paper(
    "Low-Cost High-Power Membership Inference Attacks", "Zarifzadeh, Liu and Shokri", 2023, "https://arxiv.org/abs/2312.03262"
)
KLOM = Paper(
    "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", "Georgiev, Rinberg, Park et al.", 2024,
    "https://arxiv.org/abs/2410.23232",
)  # fmt: skip
IAM = Paper(
    "Towards Lifecycle Unlearning Commitment Management: Measuring Sample-level Unlearning Completeness",
    "Wang, Li, Xiang, Cao and Wang",
    2025,
    "https://arxiv.org/abs/2506.06112",
)
RUM = Paper(
    "What makes unlearning hard and what to do about it",
    "Zhao, Kurmanji, Bărbulescu et al.",
    2024,
    "https://arxiv.org/abs/2406.01257",
)
DUCK = Paper(
    "DUCK: Distance-based Unlearning via Centroid Kinematics",
    "Cotogni, Bonato, Sabetta et al.",
    2023,
    "https://arxiv.org/abs/2312.02052",
)
BAD_TEACHER = Paper(
    "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher",
    "Chundawat, Tarun, Mandal and Kankanhalli", 2022, "https://arxiv.org/abs/2205.08096",
)  # fmt: skip
REALLY = Paper(
    "Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols", "Kim, Cha and Kim", 2025,
    "https://arxiv.org/abs/2503.06991",
)  # fmt: skip
RESTORED = Paper(
    "Suppression or Deletion: A Restoration-Based Representation-Level Analysis of Machine Unlearning",
    "Jang, Lee, Kim, Jo and Woo",
    2026,
    "https://arxiv.org/abs/2602.18505",
)
INVERSION = Paper(
    "Better Language Model Inversion by Compactly Representing Next-Token Distributions",
    "Nazir, Finlayson, Morris, Ren and Swayamdipta",
    2025,
    "https://arxiv.org/abs/2506.17090",
)
LAF = Paper(
    "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", "Shen, Zhang, Zhao et al.", 2024,
    "https://arxiv.org/abs/2404.00506",
)  # fmt: skip
MUFAC = Paper(
    "Towards Machine Unlearning Benchmarks: Forgetting the Personal Identities in Facial Recognition Systems",
    "Choi and Na", 2023, "https://arxiv.org/abs/2311.02240",
)  # fmt: skip
LOTUS = Paper(
    "LoTUS: Large-Scale Machine Unlearning with a Taste of Uncertainty", "Spartalis, Semertzidis, Gavves and Daras", 2025,
    "https://arxiv.org/abs/2503.18314",
)  # fmt: skip
COMPETITION = Paper(
    "Are we making progress in unlearning? Findings from the first NeurIPS unlearning competition",
    "Triantafillou, Kairouz, Pedregosa et al.", 2024, "https://arxiv.org/abs/2406.09073",
)  # fmt: skip
U_LIRA = Paper(
    "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy",
    "Hayes, Shumailov, Triantafillou et al.", 2024, "https://arxiv.org/abs/2403.01218",
)  # fmt: skip
LOGIT_LENS = Paper(
    "interpreting GPT: the logit lens", "nostalgebraist", 2020,
    "https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens",
)  # fmt: skip
TUNED_LENS = Paper(
    "Eliciting Latent Predictions from Transformers with the Tuned Lens", "Belrose, Ostrovsky, McKinney et al.", 2023,
    "https://arxiv.org/abs/2303.08112",
)  # fmt: skip
DEPTH_SCORE = Paper(
    "Measuring the Depth of LLM Unlearning via Activation Patching", "Lee, Kim and Jo", 2026, "https://arxiv.org/abs/2605.24614"
)
PROBES = Paper(
    "Understanding intermediate layers using linear classifier probes",
    "Alain and Bengio",
    2016,
    "https://arxiv.org/abs/1610.01644",
)
JOG = Paper(
    "Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks", "Hu, Fu, Wu and Smith", 2024,
    "https://arxiv.org/abs/2406.13356",
)  # fmt: skip
QUANTISATION = Paper(
    "Catastrophic Failure of LLM Unlearning via Quantization", "Zhang, Wang, Li et al.", 2025, "https://arxiv.org/abs/2410.16454"
)
PRUNING = Paper(
    "Learning both Weights and Connections for Efficient Neural Networks", "Han, Pool, Tran and Dally", 2015,
    "https://arxiv.org/abs/1506.02626",
)  # fmt: skip
SOK = Paper(
    "SoK: Machine Unlearning for Large Language Models", "Ren, Xing, Cui et al.", 2025, "https://arxiv.org/abs/2506.09227"
)
GUIDED = Paper(
    "Unlearned but Not Forgotten: Data Extraction after Exact Unlearning in LLM", "Wu, Pang, Liu and Wu", 2025,
    "https://arxiv.org/abs/2505.24379",
)  # fmt: skip
BACKDOOR = Paper(
    "Forgetting to Forget: Attention Sink as A Gateway for Backdooring LLM Unlearning", "Shang, Chen, Zhang, Shen and Liu", 2025,
    "https://arxiv.org/abs/2510.17021",
)  # fmt: skip
CONCEPT_VECTORS = Paper(
    "Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces", "Hong, Yu, Yang et al.", 2024,
    "https://arxiv.org/abs/2406.11614",
)  # fmt: skip
RESTOR = Paper(
    "RESTOR: Knowledge Recovery in Machine Unlearning", "Rezaei, Chandu, Feizi, Choi, Brahman and Ravichander", 2024,
    "https://arxiv.org/abs/2411.00204",
)  # fmt: skip
PISTOL = Paper(
    "PISTOL: Dataset Compilation Pipeline for Structural Unlearning of LLMs", "Qiu, Shen, Chen et al.", 2024,
    "https://arxiv.org/abs/2406.16810",
)  # fmt: skip
KNOWUNDO = Paper(
    "To Forget or Not? Towards Practical Knowledge Unlearning for Large Language Models", "Tian, Liang, Cheng et al.", 2024,
    "https://arxiv.org/abs/2407.01920",
)  # fmt: skip
HUBBLE = Paper(
    "Hubble: a Model Suite to Advance the Study of LLM Memorization", "Wei, Godbole, Khan et al.", 2025,
    "https://arxiv.org/abs/2510.19811",
)  # fmt: skip
CENSORSHIP = Paper(
    "LLM Censorship: A Machine Learning Challenge or a Computer Security Problem?",
    "Glukhov, Shumailov, Gal, Papernot and Papyan", 2023, "https://arxiv.org/abs/2307.10719",
)  # fmt: skip
CRESCENDO = Paper(
    "Great, Now Write an Article About That: The Crescendo Multi-Turn LLM Jailbreak Attack", "Russinovich, Salem and Eldan", 2024,
    "https://arxiv.org/abs/2404.01833",
)  # fmt: skip
MANY_SHOT = Paper(
    "Many-shot Jailbreaking",
    "Anil, Durmus, Panickssery et al.",
    2024,
    "https://www.anthropic.com/research/many-shot-jailbreaking",
)
LOW_RESOURCE = Paper(
    "Low-Resource Languages Jailbreak GPT-4", "Yong, Menghini and Bach", 2023, "https://arxiv.org/abs/2310.02446"
)
