"""The page's examples of sequence classification: one label, then several."""

import torch
from neox_lite import AutoTokenizer, GPTNeoXForSequenceClassification

tokenizer = AutoTokenizer.from_pretrained("someone/neox-classifier")
model = GPTNeoXForSequenceClassification.from_pretrained("someone/neox-classifier")
inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
predicted_class_id = logits.argmax().item()
print(model.config.id2label[predicted_class_id])

num_labels = len(model.config.id2label)
model = GPTNeoXForSequenceClassification.from_pretrained("someone/neox-classifier", num_labels=num_labels)
labels = torch.tensor([1])
loss = model(**inputs, labels=labels).loss
print(round(loss.item(), 2))

model = GPTNeoXForSequenceClassification.from_pretrained(
    "someone/neox-classifier", num_labels=num_labels, problem_type="multi_label_classification"
)
predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
labels = torch.sum(torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1).to(
    torch.float
)
print(round(model(**inputs, labels=labels).loss.item(), 2))
