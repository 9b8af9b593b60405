output "topic_arn" {
  description = "Where cost alerts are published, once Budgets may publish there."
  value       = aws_sns_topic.alerts.arn
  depends_on  = [aws_sns_topic_policy.alerts, aws_sns_topic_subscription.email]
}

output "budget_name" {
  description = "Name of the monthly budget."
  value       = aws_budgets_budget.month.name
}
